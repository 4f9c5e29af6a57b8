// Two gradients into one, with their norms and dot product: one pass over memory, arithmetic in fp32.
// One unit per instruction set (blend.inc); blend_ops.cpp cuts the tensors into blocks and adds up their sums.
#pragma once
#include "tile.h"

namespace longtrace {

// trace = alpha trace + beta empty for n elements, each fp32 or bf16.
struct Blend {
  void* trace;
  const void* empty;
  Dtype trace_dtype, empty_dtype;
  int64_t n;
  float alpha, beta;
};

// Of the elements as they were: |trace|^2, |empty|^2, trace.empty, and whether all are finite; fp32 sums of one block.
struct BlendSums {
  double trace_sq, empty_sq, dot;
  bool finite;
};

using BlendKernel = BlendSums (*)(const Blend&);

extern const BlendKernel blend_baseline, blend_avx2, blend_avx512;

// The widest of this processor; LONGTRACE_CPU_CAPABILITY asks for narrower ones.
BlendKernel blend_kernel();

}  // namespace longtrace
