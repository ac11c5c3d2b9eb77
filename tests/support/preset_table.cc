#include "tests/support/preset_table.h"

namespace moemamba {

RunShape shape_of(Recipe recipe) {
  switch (recipe) {
    case Recipe::main_25m:
      return {64, 1024, 150000};
    case Recipe::ablation:
      return {64, 1024, 15000};
    case Recipe::main_100m:
      return {1024, 1024, 30000};
    case Recipe::first_version:
      return {256, 256, 100000};
    case Recipe::other:
      break;
  }
  return {};
}

// Sources: paper.md, section 1.2 (models), 1.4 (inner MoE), 1.5 (ratios), 4.2 (experts), 7.
const std::vector<PresetFacts> kPresets = {
    {"transformer_25m", Recipe::main_25m, 5e-4f, {"25M", "25.20M"}, {"25M"}},
    {"transformer_v1_25m", Recipe::first_version, 1e-3f, {"25M", "25.20M"}, {"25M"}},
    {"transformer_moe_25m", Recipe::main_25m, 5e-4f, {"545M", "545.4M"}, {"25M", "25.3M"}},
    {"mamba_25m", Recipe::main_25m, 1e-3f, {"27M", "27.13M"}, {"27M"}},
    {"mamba_mlp_25m", Recipe::main_25m, 5e-4f, {"26M", "26.17M"}, {"26M"}},
    {"moe_mamba_25m", Recipe::main_25m, 5e-4f, {"542M", "542.2M"}, {"26M", "26.3M"}},
    {"moe_mamba_v1_25m", Recipe::first_version, 1e-3f, {"416M", "416.4M"}, {"26M", "26.3M"}},
    {"moe_mamba_1_25m", Recipe::ablation, 5e-4f, {"26M"}, {"26M"}},
    {"moe_mamba_2_25m", Recipe::ablation, 5e-4f, {}, {}},
    {"moe_mamba_4_25m", Recipe::ablation, 5e-4f, {"64M"}, {"26M"}},
    {"moe_mamba_8_25m", Recipe::ablation, 5e-4f, {"114M"}, {"26M"}},
    {"moe_mamba_16_25m", Recipe::ablation, 5e-4f, {"215M"}, {"26M"}},
    {"moe_mamba_32_25m", Recipe::ablation, 5e-4f, {"416M", "416.4M"}, {"26M", "26.3M"}},
    {"parallel_moe_mamba_1_25m", Recipe::ablation, 5e-4f, {}, {}},
    {"parallel_moe_mamba_2_25m", Recipe::ablation, 5e-4f, {}, {}},
    {"parallel_moe_mamba_4_25m", Recipe::ablation, 5e-4f, {}, {}},
    {"parallel_moe_mamba_8_25m", Recipe::ablation, 5e-4f, {}, {}},
    {"parallel_moe_mamba_16_25m", Recipe::ablation, 5e-4f, {}, {}},
    {"parallel_moe_mamba_25m", Recipe::ablation, 5e-4f, {}, {}},
    {"inner_moe_conv_all_25m", Recipe::ablation, 5e-4f, {}, {"28M"}},
    {"inner_moe_gate_all_25m", Recipe::ablation, 5e-4f, {}, {"28M"}},
    {"inner_moe_output_all_25m", Recipe::ablation, 5e-4f, {}, {"28M"}},
    {"inner_moe_conv_gate_all_25m", Recipe::ablation, 5e-4f, {}, {"28M"}},
    {"inner_moe_conv_output_all_25m", Recipe::ablation, 5e-4f, {}, {"28M"}},
    {"inner_moe_gate_output_all_25m", Recipe::ablation, 5e-4f, {}, {"28M"}},
    {"inner_moe_conv_gate_output_all_25m", Recipe::ablation, 5e-4f, {}, {"28M"}},
    {"inner_moe_conv_alternate_25m", Recipe::ablation, 5e-4f, {}, {"27M"}},
    {"inner_moe_gate_alternate_25m", Recipe::ablation, 5e-4f, {}, {"27M"}},
    {"inner_moe_output_alternate_25m", Recipe::ablation, 5e-4f, {}, {"28M"}},
    {"inner_moe_conv_gate_alternate_25m", Recipe::ablation, 5e-4f, {}, {"28M"}},
    {"inner_moe_conv_output_alternate_25m", Recipe::ablation, 5e-4f, {}, {"28M"}},
    {"inner_moe_gate_output_alternate_25m", Recipe::ablation, 5e-4f, {}, {"28M"}},
    {"inner_moe_conv_gate_output_alternate_25m", Recipe::ablation, 5e-4f, {}, {"28M"}},
    {"ratio_1_5_25m", Recipe::ablation, 5e-4f, {"403.1M"}, {}},
    {"ratio_2_4_25m", Recipe::ablation, 5e-4f, {"411.8M"}, {}},
    {"ratio_3_3_25m", Recipe::ablation, 5e-4f, {"416.4M"}, {"26.3M"}},
    {"ratio_4_2_25m", Recipe::ablation, 5e-4f, {"420.9M"}, {}},
    {"ratio_5_1_25m", Recipe::ablation, 5e-4f, {"425.7M"}, {}},
    {"ratio_6_0_25m", Recipe::ablation, 5e-4f, {"27.1M"}, {"27.1M"}},
    {"mamba_100m", Recipe::main_100m, 1e-3f, {"121M", "120.7M"}, {"121M"}},
    {"transformer_moe_100m", Recipe::main_100m, 2.5e-4f, {"2454M", "2454.1M"}, {"114M", "113.7M"}},
    // 117 M active in print: without the routers' 0.5 M.
    {"moe_mamba_100m", Recipe::main_100m, 5e-4f, {"2439M", "2439.1M"}, {"117.5M"}},
    {"mixtral_8x7b", Recipe::other, 0, {"46.7B"}, {"12.9B"}, true},
    {"jamba_mini_shape", Recipe::other, 0, {"52B"}, {"12B"}, true},  // Mamba for its attention
    {"routing_mamba_25m", Recipe::other, 0, {}, {}},
    {"sigmoid_moe_mamba_25m", Recipe::other, 0, {}, {}},
    {"quickstart", Recipe::other, 0, {}, {}},
};

namespace hand {

// N = 16, W = 4, R = D / 16. in_proj, conv1d, x_proj, dt_proj, A_log, D, out_proj.
int64_t mamba(int64_t D, int64_t I) {
  const int64_t R = D / 16;
  return 2 * I * D + 5 * I + (R + 32) * I + (R + 1) * I + 16 * I + I + I * D;
}

namespace {

// blocks of `fixed` parameters with routers, and E experts of which a token meets K.
HandCount count(const std::string& name, int64_t blocks, int64_t fixed, int64_t E = 0,
                int64_t expert = 0, int64_t K = 1) {
  return {name, blocks * (fixed + E * expert), blocks * (fixed + (E > 0 ? K : 0) * expert)};
}

constexpr int64_t kNorm = 2 * 512;  // gain and bias

void add_paper(std::vector<HandCount>& list) {
  const int64_t attention = 4 * 512 * 512, dense = 2 * 512 * 2048 + 2048 + 512;
  list.push_back(count("transformer_25m", 8, attention + dense + 2 * kNorm));
  list.push_back(count("transformer_v1_25m", 8, attention + dense + 2 * kNorm));
  list.push_back(
      count("transformer_moe_25m", 8, attention + 32 * 512 + 2 * kNorm, 32, 2 * 512 * 2048));
  list.push_back(count("mamba_25m", 16, 1694720 + kNorm));
  list.push_back(count("mamba_mlp_25m", 8, 1694720 + 2 * 512 * 1536 + 1536 + 512 + 2 * kNorm));
  list.push_back(count("moe_mamba_25m", 8, 1694720 + 42 * 512 + 2 * kNorm, 42, 2 * 512 * 1536));
  for (int64_t E : {1, 2, 4, 8, 16, 32}) {
    const std::string number = "_" + std::to_string(E);
    const int64_t fixed = 1694720 + E * 512, expert = 2 * 512 * 1536;
    list.push_back(count("moe_mamba" + number + "_25m", 8, fixed + 2 * kNorm, E, expert));
    list.push_back(count("parallel_moe_mamba" + (E == 32 ? "" : number) + "_25m", 8, fixed + kNorm,
                         E, expert));  // one norm
  }
  list.push_back(count("mamba_100m", 32, 3770880 + 2 * 768));
  list.push_back(
      count("transformer_moe_100m", 16, 4 * 768 * 768 + 32 * 768 + 4 * 768, 32, 2 * 768 * 3072));
  list.push_back(count("moe_mamba_100m", 16, 3770880 + 42 * 768 + 4 * 768, 42, 2 * 768 * 2304));
}

void add_ratios(std::vector<HandCount>& list) {
  struct Ratio {
    const char* name;
    int64_t I, F, E;
  };
  for (const Ratio& r :
       {Ratio{"ratio_1_5_25m", 341, 2560, 19}, Ratio{"ratio_2_4_25m", 682, 2048, 24},
        Ratio{"ratio_3_3_25m", 1024, 1536, 32}, Ratio{"ratio_4_2_25m", 1365, 1024, 48},
        Ratio{"ratio_5_1_25m", 1706, 512, 96}})
    list.push_back(count(r.name, 8, mamba(512, r.I) + r.E * 512 + 2 * kNorm, r.E, 2 * 512 * r.F));
  list.push_back(count("ratio_6_0_25m", 8, mamba(512, 2048) + kNorm));
}

// 540,672 parameters an expert in place of a projection of 524,288, and a router that reads what
// the projection reads: 512 wide, the output's 1024.
void add_inner_moe(std::vector<HandCount>& list) {
  struct Choice {
    const char* name;
    int64_t projections, read;
  };
  for (const Choice& c : {Choice{"conv", 1, 512}, Choice{"gate", 1, 512}, Choice{"output", 1, 1024},
                          Choice{"conv_gate", 2, 1024}, Choice{"conv_output", 2, 1536},
                          Choice{"gate_output", 2, 1536}, Choice{"conv_gate_output", 3, 2048}})
    for (bool all : {true, false}) {
      const int64_t E = (all ? 24 : 48) / c.projections, layers = all ? 16 : 8;
      const int64_t rest = 1694720 - c.projections * 524288 + kNorm + E * c.read;
      const int64_t plain = (16 - layers) * (1694720 + kNorm);
      HandCount made =
          count(std::string("inner_moe_") + c.name + (all ? "_all" : "_alternate") + "_25m", layers,
                rest, E, c.projections * 540672);
      made.total += plain;
      made.active += plain;
      list.push_back(made);
    }
}

void add_others(std::vector<HandCount>& list) {
  const int64_t swiglu = 3 * int64_t{4096} * 14336, heads = 4096 * 4096, shared_heads = 4096 * 1024;
  HandCount mixtral =
      count("mixtral_8x7b", 32, 2 * heads + 2 * shared_heads + 8 * 4096 + 2 * 4096, 8, swiglu, 2);
  // RMSNorms of dt, B and C; R is 256 = D / 16.
  const int64_t mixer = mamba(4096, 8192) + 256 + 16 + 16;
  const HandCount dense = count("", 16, mixer + swiglu + 2 * 4096);
  const HandCount sparse = count("", 16, mixer + 16 * 4096 + 2 * 4096, 16, swiglu, 2);
  mixtral.total += 4096;  // the final norm
  mixtral.active += 4096;
  list.push_back(mixtral);
  list.push_back(
      {"jamba_mini_shape", dense.total + sparse.total + 4096, dense.active + sparse.active + 4096});
  list.push_back(
      count("routing_mamba_25m", 16, 1694720 - 3 * 524288 + kNorm + 8 * 512, 8, 3 * 524288));
  list.push_back(count("sigmoid_moe_mamba_25m", 8, 1694720 + 2 * kNorm + 128 * 512 + 2 * 512 * 384,
                       128, 2 * 512 * 384, 3));
}

}  // namespace
}  // namespace hand

std::vector<HandCount> hand_counts() {
  std::vector<HandCount> list;
  hand::add_paper(list);
  hand::add_ratios(list);
  hand::add_inner_moe(list);
  hand::add_others(list);
  return list;
}

}  // namespace moemamba
