#include "kernels/cpu/simd/conv.h"

#include "kernels/cpu/simd/channels.h"

namespace moemamba::MOEMAMBA_SIMD {

namespace {

constexpr int kHistory = kConvWidth - 1;

// A piece of one sequence: tokens begin .. end - 1, of one document, at most kConvPiece.
struct Piece {
  int64_t begin, end;
  bool start;  // a document begins with it
};

struct Place {
  const ConvInputs& in;
  int64_t sequence, channel;
  int channels;

  Place(const ConvInputs& in, int64_t sequence, int64_t block)
      : in(in),
        sequence(sequence),
        channel(block * kConvLanes),
        channels(channels_of_block(in.D, block)) {}

  int64_t token(int64_t t) const { return sequence * in.L + t; }
  bool starts(int64_t t) const { return in.starts && in.starts[token(t)]; }
  Piece piece_from(int64_t begin) const {
    int64_t end = begin + 1;
    while (end < in.L && end - begin < kConvPiece && !starts(end)) ++end;
    return {begin, end, starts(begin)};
  }
  Piece piece_to(int64_t end) const {
    int64_t begin = end - 1;
    while (begin % kConvPiece != 0 && !starts(begin)) --begin;
    return {begin, end, starts(begin)};
  }
  // Row r of the sequence's [W - 1, D] in an initial or final tensor.
  int64_t border(int64_t r) const { return sequence * (in.W - 1) + r; }
};

struct Tile {
  float rows[kHistory + kConvPiece][kConvLanes];  // the W - 1 tokens before a piece, then its own
};

// The inputs of the W - 1 tokens before t; zero before a document's first token. `t` may be L.
void load_history(const Place& place, int64_t t, Tile& tile) {
  const ConvInputs& in = place.in;
  bool cut = t < in.L && place.starts(t);
  for (int64_t back = 1; back < in.W; ++back) {
    const int64_t from = t - back;
    Lanes x = all(0.f);
    if (!cut && from >= 0)
      x = load_channels(at(in.x, place.token(from), place.channel), place.channels);
    else if (!cut && in.initial.data)
      x = load_channels(at(in.initial, place.border(in.W - 1 + from), place.channel),
                        place.channels);
    store(tile.rows[in.W - 1 - back], x);
    cut = cut || (from >= 0 && place.starts(from));
  }
}

void load_piece(const Place& place, const Piece& piece, Tile& tile) {
  const ConvInputs& in = place.in;
  load_history(place, piece.begin, tile);
  const float* x = at(in.x, place.token(piece.begin), place.channel);
  for (int64_t t = 0; t < piece.end - piece.begin; ++t, x += in.x.stride) {
    __builtin_prefetch(x + kConvPiece * in.x.stride);
    store(tile.rows[in.W - 1 + t], load_channels(x, place.channels));
  }
}

struct Weights {
  float rows[kConvWidth + 1][kConvLanes];  // a row per tap, then the bias

  explicit Weights(const Place& place) {
    const ConvInputs& in = place.in;
    for (int64_t w = 0; w < in.W; ++w)
      for (int lane = 0; lane < kConvLanes; ++lane)
        rows[w][lane] = lane < place.channels ? *at(in.weight, place.channel + lane, w) : 0;
    store(rows[in.W], load_channels(in.bias + place.channel, place.channels));
  }
};

// p of the piece's token t.
inline Lanes convolve(const Weights& weights, const Tile& tile, int64_t t, int64_t W) {
  Lanes p = load(weights.rows[W]);
  for (int64_t w = 0; w < W; ++w) p = fma(load(weights.rows[w]), load(tile.rows[t + w]), p);
  return p;
}

void conv_forward(const ConvForwardCall& call, int64_t sequence, int64_t block) {
  const ConvInputs& in = call.in;
  const Place place(in, sequence, block);
  const Weights weights(place);
  Tile tile;
  for (int64_t begin = 0; begin < in.L;) {
    const Piece piece = place.piece_from(begin);
    load_piece(place, piece, tile);
    float* y = at(call.y, place.token(begin), place.channel);
    for (int64_t t = 0; t < piece.end - begin; ++t, y += call.y.stride) {
      const Lanes p = convolve(weights, tile, t, in.W);
      store_channels(y, p * sigmoid(p), place.channels);
    }
    begin = piece.end;
  }
  if (!call.final.data) return;
  load_history(place, in.L, tile);
  for (int64_t r = 0; r + 1 < in.W; ++r)
    store_channels(at(call.final, place.border(r), place.channel), load(tile.rows[r]),
                   place.channels);
}

struct Sums {
  float rows[kConvWidth + 1][kConvLanes];  // of dweight per tap, of dbias
};

// Adds a piece's part: dx of the tokens that it reads into `dx` (like `x`), weight gradients.
void piece_backward(const ConvBackwardCall& call, const Place& place, const Piece& piece,
                    const Weights& weights, const Tile& x, Tile& dx, Sums& sums) {
  const int64_t W = place.in.W;
  const float* row = at(call.dy, place.token(piece.begin), place.channel);
  for (int64_t t = 0; t < piece.end - piece.begin; ++t, row += call.dy.stride) {
    __builtin_prefetch(row - kConvPiece * call.dy.stride);
    const Lanes p = convolve(weights, x, t, W);
    const Lanes s = sigmoid(p);
    const Lanes slope = s * fma(p, all(1.f) - s, all(1.f));
    const Lanes dp = load_channels(row, place.channels) * slope;
    for (int64_t w = 0; w < W; ++w) {
      store(dx.rows[t + w], fma(load(weights.rows[w]), dp, load(dx.rows[t + w])));
      store(sums.rows[w], fma(dp, load(x.rows[t + w]), load(sums.rows[w])));
    }
    store(sums.rows[W], load(sums.rows[W]) + dp);
  }
}

// Pieces from last to first. `carry` is the gradient that later pieces hand to the W - 1 tokens
// before them.
void conv_backward(const ConvBackwardCall& call, int64_t sequence, int64_t block) {
  const ConvInputs& in = call.in;
  const Place place(in, sequence, block);
  const Weights weights(place);
  const int64_t history = in.W - 1;
  Tile x, dx;
  Sums sums = {};
  float carry[kHistory][kConvLanes];
  for (int64_t r = 0; r < history; ++r)
    store(carry[r],
          call.dfinal.data
              ? load_channels(at(call.dfinal, place.border(r), place.channel), place.channels)
              : all(0.f));
  for (int64_t end = in.L; end > 0;) {
    const Piece piece = place.piece_to(end);
    const int64_t count = piece.end - piece.begin;
    load_piece(place, piece, x);
    for (int64_t r = 0; r < count; ++r) store(dx.rows[r], all(0.f));
    for (int64_t r = 0; r < history; ++r) store(dx.rows[count + r], load(carry[r]));
    piece_backward(call, place, piece, weights, x, dx, sums);
    float* row = at(call.dx, place.token(piece.begin), place.channel);
    for (int64_t t = 0; t < count; ++t, row += call.dx.stride)
      store_channels(row, load(dx.rows[history + t]), place.channels);
    for (int64_t r = 0; r < history; ++r)
      store(carry[r], piece.start ? all(0.f) : load(dx.rows[r]));
    end = piece.begin;
  }
  float* out = call.sums + (sequence * in.blocks + block) * (in.W + 1) * kConvLanes;
  for (int64_t w = 0; w <= in.W; ++w) store(out + w * kConvLanes, load(sums.rows[w]));
  if (!call.dinitial.data) return;
  for (int64_t r = 0; r < history; ++r)
    store_channels(at(call.dinitial, place.border(r), place.channel), load(carry[r]),
                   place.channels);
}

}  // namespace

const ConvKernels conv_kernels = {.forward = conv_forward, .backward = conv_backward};

}  // namespace moemamba::MOEMAMBA_SIMD
