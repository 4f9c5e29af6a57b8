// The layers around attention and the head: RMSNorm, rotary embedding, gated activations; forward and backward.
// One pass over memory each, arithmetic in fp32, one table per instruction set (layers.inc); layer_ops.cpp hands out rows.
#pragma once
#include "tile.h"

namespace longtrace {

// y = x / rms(x) * (offset + weight). `x`, `residual`, `sum`, `y`, `weight` are of `dtype`, fp32 or bf16.
struct RmsNorm {
  Dtype dtype;
  int64_t H;
  double eps;
  float offset;  // offset 0: x / rms is rounded to `dtype` before the weight (Llama); else rounded once (Gemma)
  const void* x;
  const void* residual;  // null, or added to x first: `sum` keeps what is normalised
  const void* weight;
  int64_t ldx, ld_residual;
  void *y, *sum;  // row stride H
  float* scale;   // (rows,): 1 / rms
};

struct RmsNormBackward {
  Dtype dtype;
  int64_t H;
  float offset;
  const void *dy, *dsum;  // dsum: gradient of `sum`, or null
  const void *x, *weight;
  const float* scale;
  int64_t ld_dy, ld_dsum, ldx;
  void* dx;  // row stride H
};

// y = x cos + rotate_half(x) sin on the first 2 `half` entries of each head, the rest copied; the transpose in the backward.
struct Rope {
  Dtype dtype;
  int64_t heads, D, half;
  const void *x, *cos, *sin;
  int64_t ldx, ld_head, ld_cos, ld_sin;  // x[t * ldx + head * ld_head]
  int64_t second;                        // where the second half's cos and sin lie in a row: `half`, or 0 if shared
  bool backward;
  void* y;  // (T, heads, D), contiguous
};

// out = act(gate) * up, act silu or gelu (tanh); with dy: dgate and dup.
struct Glu {
  Dtype dtype;
  int64_t columns;
  bool gelu;
  const void *gate, *up, *dy;
  int64_t ld_gate, ld_up, ld_dy;
  void *out, *dgate, *dup;  // row stride `columns`
};

struct LayerKernels {
  const char* name;
  // Rows [begin, end) of each.
  void (*rms_norm)(const RmsNorm&, int64_t begin, int64_t end);
  // Adds to dweight unless that is null; run: H zeros, zeros again after.
  void (*rms_norm_backward)(const RmsNormBackward&, int64_t begin, int64_t end, float* run, double* dweight);
  void (*rope)(const Rope&, int64_t begin, int64_t end);
  void (*glu)(const Glu&, int64_t begin, int64_t end);
  void (*glu_backward)(const Glu&, int64_t begin, int64_t end);
};

extern const LayerKernels layers_baseline, layers_avx2, layers_avx512, layers_avx512_bf16;

// The widest of this processor; LONGTRACE_CPU_CAPABILITY asks for narrower ones.
const LayerKernels& layer_kernels();

}  // namespace longtrace
