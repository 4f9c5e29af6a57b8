// Row-wise passes of the head over a chunk of fp32 logits; see kernels/head/epilogue.py for the same maths in PyTorch.
#pragma once
#include <cstdint>

namespace longtrace {

struct RowStats {
  float maximum, log_sum, log_prob, entropy;
};

// One instruction set's versions of the two passes. `row` points at V logits.
struct SoftmaxKernels {
  const char* name;
  // Statistics of one row at `target`; the entropy costs a multiplication more and is skipped on request.
  RowStats (*stats)(const float* row, int64_t V, int64_t target, bool entropy);
  // row <- a p - b 1[v = target] - e p (log p + entropy), with p = exp((z - maximum) - log_sum).
  void (*dlogits)(float* row, int64_t V, int64_t target, RowStats stats, float a, float b, float e);
};

extern const SoftmaxKernels softmax_baseline, softmax_avx2, softmax_avx512;

// The widest version this processor runs.
const SoftmaxKernels& softmax_kernels();

}  // namespace longtrace
