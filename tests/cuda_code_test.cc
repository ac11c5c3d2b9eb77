// What nvcc made of the kernels: no sums whose order hangs on chance, no spills in hot kernels.
// Needs no GPU: reads the PTX that the build leaves in its libraries, and docs/cuda_kernels.md,
// which scripts/kernel_report.sh writes; where scripts/test.sh had it written anew, to build, that
// is read too, printed, and held against the page. A build without CUDA reads no PTX.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "core/error.h"
#include "core/gpu.h"

namespace moemamba {
namespace {

namespace fs = std::filesystem;

// An atomic compare-and-swap is how a compiler makes a float's atomic sum where the machine has
// none. So every kernel with one stands here, with the reason why it is none.
struct AllowedSwap {
  const char* kernel;  // part of its mangled name
  const char* reason;
};
constexpr std::array<AllowedSwap, 0> kAllowedSwaps{};

struct Finding {
  std::string kernel, instruction;
};

bool starts_with_any(std::string_view text, std::initializer_list<const char*> starts) {
  return std::ranges::any_of(starts, [&](const char* start) { return text.starts_with(start); });
}

// ".f32", ".bf16x2" and the like among an instruction's parts. SASS writes them in capitals.
bool of_floats(std::string_view opcode) {
  static const std::regex type("\\.(E[0-9]M[0-9]|B?F(16|32|64)|e[0-9]m[0-9]|b?f(16|32|64)).*");
  for (size_t at = opcode.find('.'); at != opcode.npos; at = opcode.find('.', at + 1)) {
    const size_t end = opcode.find('.', at + 1);
    const std::string part(opcode.substr(at, end == opcode.npos ? end : end - at));
    if (std::regex_match(part, type)) return true;
  }
  return false;
}

bool swap_allowed(std::string_view kernel) {
  return std::ranges::any_of(kAllowedSwaps, [&](const AllowedSwap& allowed) {
    return kernel.find(allowed.kernel) != kernel.npos;
  });
}

// Whether an instruction of PTX or SASS adds to memory in no fixed order. A swap in SASS alone is
// ptxas' way for integers: PTX had named a float's.
bool forbidden(std::string_view opcode, std::string_view kernel) {
  if (starts_with_any(opcode, {"cp.reduce", "UBLKRED", "UTMARED", "multimem.red"})) return true;
  if (starts_with_any(opcode, {"red.", "atom.", "RED.", "REDG.", "REDS.", "ATOM", "multimem."}) &&
      of_floats(opcode))
    return true;
  const bool swap = opcode.starts_with("atom.") && opcode.find(".cas") != opcode.npos;
  return swap && !swap_allowed(kernel);
}

// The first word of an instruction behind its predicate: "@%p1 red.global.add.u32 [..." of PTX, and
// "/*00a0*/ @!P0 REDG.E.ADD.F32 desc[..." of SASS.
std::string_view opcode_of(std::string_view line) {
  const auto skip_blanks = [&] {
    line.remove_prefix(std::min(line.find_first_not_of(" \t{"), line.size()));
  };
  const auto skip_word = [&] {
    line.remove_prefix(std::min(line.find_first_of(" \t"), line.size()));
  };
  skip_blanks();
  while (line.starts_with("/*") || line.starts_with("@")) {
    skip_word();
    skip_blanks();
  }
  return line.substr(0, line.find_first_of(" \t;"));
}

struct Scan {
  int64_t kernels = 0, instructions = 0;
  std::vector<Finding> findings;
};

// Of PTX (".entry name(", ".func") or SASS ("Function : name").
void scan_line(std::string_view line, std::string& kernel, Scan& scan) {
  for (std::string_view mark : {".entry ", ".func ", "Function : "}) {
    const size_t at = line.find(mark);
    if (at == line.npos) continue;
    kernel = line.substr(at + mark.size());
    scan.kernels += mark != ".func ";
    return;
  }
  const std::string_view opcode = opcode_of(line);
  if (opcode.empty() || opcode[0] == '.' || opcode[0] == '/') return;
  ++scan.instructions;
  if (forbidden(opcode, kernel)) scan.findings.push_back({kernel, std::string(opcode)});
}

void scan_text(std::string_view text, Scan& scan) {
  std::string kernel;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    scan_line(text.substr(begin, end - begin), kernel, scan);
    begin = end + 1;
  }
}

// The PTX texts in a library whose device code is not compressed (cmake/cuda.cmake).
std::vector<std::string_view> ptx_of(std::string_view library) {
  std::vector<std::string_view> texts;
  for (size_t at = 0; (at = library.find(".version ", at)) != library.npos;) {
    const size_t end = std::min(library.find('\0', at), library.size());
    const std::string_view text = library.substr(at, end - at);
    if (text.find("\n.target sm_") != text.npos) texts.push_back(text);
    at = end;
  }
  return texts;
}

std::string content_of(const fs::path& file) {
  std::ifstream in(file, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

void expect_clean(const Scan& scan, const std::string& where) {
  for (const Finding& finding : scan.findings)
    ADD_FAILURE() << where << ": " << finding.instruction << " in " << finding.kernel
                  << ": a sum of this order is another on every run";
}

TEST(CudaCode, TheScannerFindsWhatIsForbidden) {
  const auto finds = [](const char* line) {
    Scan scan;
    scan_text(concat(".visible .entry kernel(\n", line, "\n"), scan);
    EXPECT_EQ(scan.kernels, 1);
    return scan.findings.size() == 1 && scan.findings[0].kernel.starts_with("kernel(");
  };
  for (const char* line :
       {"\tred.global.add.f32 \t[%rd1], %f1;", "\t@%p1 red.relaxed.gpu.global.add.f32 [%rd1], %f1;",
        "\tatom.global.add.f64 \t%fd1, [%rd1], %fd2;", "\tatom.add.noftz.bf16x2 %r1, [%rd1], %r2;",
        "\tred.global.add.noftz.f16x2 [%rd1], %r2;", "{ atom.shared.add.f32 %f1, [%r1], %f2;",
        "\tatom.global.v4.f32.add {%f1}, [%rd1], {%f2};", "\tatom.cas.b32 %r1, [%rd1], %r2, %r3;",
        "\tatom.shared.cas.b64 %rd1, [%r1], %rd2, %rd3;",
        "\tcp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd1], [%r1], 16;",
        "\tmultimem.red.global.add.f32 [%rd1], %f1;",
        "   /*00a0*/  @!P0 REDG.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5 ;",
        "   /*00a0*/       RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2], R5 ;",
        "   /*00a0*/       ATOMG.E.ADD.F64.RN.STRONG.GPU PT, R2, desc[UR4][R2.64], R4 ;",
        "   /*0b10*/       UBLKRED.G.S.ADD.F32 [UR4], [UR6], UR8 ;"})
    EXPECT_TRUE(finds(line)) << line;
  for (const char* line :
       {"\tred.global.add.u32 \t[%rd1], 1;", "\tatom.shared.or.b32 %r1, [%r2], 1;",
        "\tatom.global.exch.b32 %r1, [%rd1], %r2;", "\tredux.sync.add.s32 %r1, %r2, %r3;",
        "\tadd.f32 %f1, %f2, %f3;", "\t// red.global.add.f32", "\t.loc 1 20 3",
        "   /*00a0*/       REDUX.SUM UR4, R5 ;",
        "   /*00a0*/       ATOMS.POPC.INC.32 RZ, [R4+URZ] ;",
        "   /*00a0*/       ATOMS.CAS.64 R2, [R3], R4, R6 ;"})
    EXPECT_FALSE(finds(line)) << line;
}

TEST(CudaCode, TheScannerFindsPtxInALibrary) {
  const std::string library =
      std::string("\x7f" "ELF\0.version 9.0\0.target sm_90a\0", 34) +
      ".version 9.0\n.target sm_90a\n.entry one(\n\tred.global.add.f32 [%rd1], %f1;\n" +
      std::string("\0rest\0", 6) + ".version 9.0\n.target sm_90a\n.entry two(\n\tret;\n";
  const auto texts = ptx_of(library);
  ASSERT_EQ(texts.size(), 2u);
  Scan scan;
  for (std::string_view text : texts) scan_text(text, scan);
  EXPECT_EQ(scan.kernels, 2);
  EXPECT_EQ(scan.findings.size(), 1u);
}

TEST(CudaCode, AddsNoFloatsInAnOrderOfChance) {
  if (gpu::build() == "no CUDA") {
    std::printf("a build without CUDA: no code of kernels to read\n");
    return;
  }
  for (const char* name : {"libmoemamba_kernels.a", "libmoemamba_parallel.a"}) {
    const std::string library = content_of(fs::path(MOEMAMBA_BINARY_DIR) / name);
    Scan scan;
    for (std::string_view text : ptx_of(library)) scan_text(text, scan);
    EXPECT_GT(scan.kernels, 5) << name << " has no PTX: CMAKE_CUDA_ARCHITECTURES needs an entry "
                               << "without -real, and nvcc --no-compress";
    expect_clean(scan, concat("PTX of ", name));
    std::printf("%s: %d kernels, %d instructions of PTX\n", name, int(scan.kernels),
                int(scan.instructions));
  }
}

// Where the toolkit has a disassembler, also what ptxas and the older architecture made of it.
TEST(CudaCode, AddsNoFloatsInAnOrderOfChanceInSassEither) {
  const std::string tool = MOEMAMBA_CUOBJDUMP;
  if (gpu::build() == "no CUDA" || tool.empty()) {
    std::printf("no cuobjdump was found, or no CUDA: SASS was not read\n");
    return;
  }
  for (const char* name : {"libmoemamba_kernels.a", "libmoemamba_parallel.a"}) {
    const std::string command = concat("'", tool, "' -sass '", MOEMAMBA_BINARY_DIR, "/", name, "'");
    FILE* pipe = popen(command.c_str(), "r");
    ASSERT_NE(pipe, nullptr) << command;
    Scan scan;
    std::string kernel, line;
    for (int c; (c = std::fgetc(pipe)) != EOF;) {
      if (c != '\n') {
        line.push_back(char(c));
        continue;
      }
      scan_line(line, kernel, scan);
      line.clear();
    }
    EXPECT_EQ(pclose(pipe), 0) << command;
    EXPECT_GT(scan.kernels, 5) << command;
    expect_clean(scan, concat("SASS of ", name));
  }
}

// --- the sources and the page -------------------------------------------------------------------

// Names of the kernels that a source defines: what follows __global__, its bounds and its type.
std::vector<std::string> kernels_of(const std::string& text) {
  static const std::regex kernel(
      "__global__\\s+(?:static\\s+)?(?:void\\s+)?(?:__launch_bounds__\\s*"
      "\\((?:[^()]|\\([^()]*\\))*\\)\\s*)?(?:void\\s+)?(\\w+)\\s*\\(");
  std::vector<std::string> names;
  for (std::sregex_iterator it(text.begin(), text.end(), kernel), end; it != end; ++it)
    names.push_back((*it)[1]);
  return names;
}

struct Reported {
  std::string file, instance;  // with template arguments
  std::string kernel;          // without them, and without its namespace
  int64_t registers, stack, spills;
};

// Rows of docs/cuda_kernels.md: | file | `kernel<...>` | registers | shared | stack | spills |
std::vector<Reported> report(const std::string& text) {
  static const std::regex row(
      "\\| (\\S+) \\| `(([\\w:]+)[^`]*)` \\| (\\d+) \\| (\\d+) \\| (\\d+) \\| (\\d+) \\|");
  std::vector<Reported> rows;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    std::smatch match;
    if (!std::regex_match(line, match, row)) continue;
    std::string kernel = match[3];
    if (!kernel.starts_with("cub::")) kernel = kernel.substr(kernel.rfind(':') + 1);
    rows.push_back({match[1], match[2], kernel, std::stoll(match[4]), std::stoll(match[6]),
                    std::stoll(match[7])});
  }
  return rows;
}

std::string page() { return content_of(fs::path(MOEMAMBA_SOURCE_DIR) / "docs/cuda_kernels.md"); }

// Of all .cu and .cuh files, by their path from the root.
std::map<std::string, std::vector<std::string>> kernels_of_sources() {
  std::map<std::string, std::vector<std::string>> kernels;
  for (const char* folder : {"kernels/cuda", "parallel/cuda"})
    for (const auto& entry : fs::directory_iterator(fs::path(MOEMAMBA_SOURCE_DIR) / folder)) {
      const fs::path& path = entry.path();
      if (path.extension() != ".cu" && path.extension() != ".cuh") continue;
      kernels[concat(folder, "/", path.filename().string())] = kernels_of(content_of(path));
    }
  return kernels;
}

// A step spends its time in these files' kernels.
bool hot(const std::string& file) {
  return starts_with_any(fs::path(file).filename().string(),
                         {"scan", "conv", "grouped", "matmul", "norm", "cross_entropy",
                          "routing_rows", "attention"});
}

TEST(CudaKernels, AreFoundInTheSources) {
  EXPECT_EQ(kernels_of("__global__ void __launch_bounds__(32 * f(2), P == 2 ? 2 : 4)\n  a(int x) {}"
                       " template <class T> __global__ __launch_bounds__(32) void b(T) {}"
                       " __global__ void c() {}"),
            (std::vector<std::string>{"a", "b", "c"}));
  int64_t count = 0, marks = 0;
  for (const auto& [file, kernels] : kernels_of_sources()) {
    count += int64_t(kernels.size());
    const std::string text = content_of(fs::path(MOEMAMBA_SOURCE_DIR) / file);
    for (size_t at = 0; (at = text.find("__global__", at)) != text.npos; ++at) ++marks;
  }
  EXPECT_EQ(count, marks) << "a kernel is written in a way that this test does not read";
  EXPECT_GT(count, 20);
}

TEST(CudaKernels, AreAllOnThePageAndNoOther) {
  const char* advice = "; run sh scripts/kernel_report.sh";
  const auto sources = kernels_of_sources();
  std::set<std::string> everywhere, reported;
  for (const auto& [file, kernels] : sources) everywhere.insert(kernels.begin(), kernels.end());
  std::map<std::string, std::set<std::string>> by_file;
  for (const Reported& row : report(page())) {
    by_file[row.file].insert(row.kernel);
    reported.insert(row.kernel);
    EXPECT_TRUE(sources.contains(row.file)) << row.file << advice;
    EXPECT_TRUE(row.kernel.starts_with("cub::") || everywhere.contains(row.kernel))
        << row.file << ": " << row.kernel << " is on the page, but in no source" << advice;
  }
  for (const auto& [file, kernels] : sources)
    for (const std::string& kernel : kernels)
      EXPECT_TRUE(file.ends_with(".cu") ? by_file[file].contains(kernel)
                                        : reported.contains(kernel))
          << file << ": " << kernel << " is not on the page" << advice;
}

// print: one line for each of the hot.
void expect_no_spills(const std::vector<Reported>& rows, bool print) {
  EXPECT_GT(rows.size(), 50u);
  int64_t looked_at = 0;
  for (const Reported& row : rows) {
    if (!hot(row.file)) continue;
    ++looked_at;
    EXPECT_EQ(row.spills, 0) << row.file << ": " << row.kernel;
    if (print)
      std::printf("  %s %s: %d registers, %d bytes of stack, %d of spills\n", row.file.c_str(),
                  row.instance.c_str(), int(row.registers), int(row.stack), int(row.spills));
  }
  EXPECT_GT(looked_at, 30);
}

// The line of the page that names the compiler: another one makes other code.
std::string compiler_of(const std::string& text) {
  const size_t at = text.find("\nCompiler: ");
  return at == text.npos ? "" : text.substr(at + 1, text.find('\n', at + 1) - at - 1);
}

// scripts/test.sh has the sources compiled for that once more, before it runs this.
TEST(CudaKernels, SpillNothingAsTheyAreCompiledNow) {
  const std::string now = content_of(fs::path(MOEMAMBA_SOURCE_DIR) / "build/cuda_kernels.md");
  if (now.empty()) {
    std::printf("no build/cuda_kernels.md (sh scripts/kernel_report.sh build/cuda_kernels.md)\n");
    return;
  }
  expect_no_spills(report(now), true);
  if (compiler_of(now) == compiler_of(page())) {
    EXPECT_EQ(now, page()) << "docs/cuda_kernels.md is not of these sources; run "
                           << "sh scripts/kernel_report.sh";
  }
}

TEST(CudaKernels, SpillNothingWhereTheyAreHot) {
  expect_no_spills(report(page()), false);
  EXPECT_EQ(report("| kernels/cuda/scan.cu | `a<1, float>` | 255 | 0 | 80 | 64 |")[0].spills, 64);
}

}  // namespace
}  // namespace moemamba
