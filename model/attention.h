#pragma once
#include "model/config.h"
#include "model/linear.h"

namespace moemamba {
// letters: T tokens, D width, H heads, Hkv key/value heads, dh width of a head

// Causal self-attention with fused projections: out attend(rope(qkv x)).
struct Attention {
  int index = 0;  // among the attention layers: which cache is its own
  int64_t heads = 1, kv_heads = 1, head_width = 1;
  bool rotary = false;
  double rope_base = 10000;
  Linear qkv;  // [(H + 2 Hkv) dh, D]: q heads, k heads, v heads
  Linear out;  // [D, H dh]

  struct Saved {
    Tensor x;    // [T, D] the layer's input
    Tensor qkv;  // [T, (H + 2 Hkv) dh], q and k turned
    Tensor y;    // [T, H dh]
    Tensor lse;  // [T, H]
  };
  static Attention make(ParameterStore& store, const std::string& name, const ModelSizes& sizes,
                        int index);
  Tensor forward(Step& step, Tensor x, Saved& saved) const;
  // dx [T, D] written.
  void backward(Step& step, Tensor dy, Tensor dx, const Saved& saved) const;

 private:
  void turn(Step& step, Tensor qkv, bool inverse) const;
};
static_assert(Layer<Attention>);

}  // namespace moemamba
