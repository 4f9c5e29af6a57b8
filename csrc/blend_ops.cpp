// The torch op of the gradient blend: lists of tensors cut into fixed blocks, whose sums are added in order.
#include <algorithm>
#include <vector>

#include "cpu/blend.h"
#include "ops.h"

namespace longtrace {
namespace {

constexpr int64_t kBlock = 16384;  // elements summed in fp32; the sums of blocks are fp64

struct Pair {
  void* trace;
  const void* empty;
  Dtype trace_dtype, empty_dtype;
  int64_t n, first_block;
};

Pair checked_pair(const Tensor& trace, const Tensor& empty, int64_t first_block) {
  const Dtype t = dtype_of(trace, "trace"), e = dtype_of(empty, "empty");
  STD_TORCH_CHECK(t != Dtype::fp16 && e != Dtype::fp16, "gradients must be fp32 or bf16");
  STD_TORCH_CHECK(trace.is_contiguous() && empty.is_contiguous(), "gradients must be contiguous");
  STD_TORCH_CHECK(trace.numel() == empty.numel(), "gradients must have the same shapes");
  return {trace.mutable_data_ptr(), empty.const_data_ptr(), t, e, trace.numel(), first_block};
}

char* at(void* data, Dtype dtype, int64_t i) { return static_cast<char*>(data) + i * (dtype == Dtype::fp32 ? 4 : 2); }
const char* at(const void* data, Dtype dtype, int64_t i) { return at(const_cast<void*>(data), dtype, i); }

// trace = alpha trace + (1 - alpha) empty; (4,) fp64: |trace|^2, |empty|^2, their dot, how many blocks were not finite.
Tensor blend_gradients_(const std::vector<Tensor>& trace, const std::vector<Tensor>& empty, double alpha) {
  STD_TORCH_CHECK(!trace.empty() && trace.size() == empty.size(), "trace and empty must be equally many, at least one");
  std::vector<Pair> pairs;
  int64_t blocks = 0;
  for (size_t i = 0; i < trace.size(); ++i) {
    pairs.push_back(checked_pair(trace[i], empty[i], blocks));
    blocks += (pairs.back().n + kBlock - 1) / kBlock;
  }
  std::vector<BlendSums> sums(blocks);
  const BlendKernel blend = blend_kernel();
  for_each(blocks, [&](int64_t begin, int64_t end) {
    auto pair = std::upper_bound(pairs.begin(), pairs.end(), begin, [](int64_t b, const Pair& p) { return b < p.first_block; });
    for (int64_t b = begin; b < end; ++b) {
      while (pair != pairs.end() && pair->first_block <= b) ++pair;
      const Pair& p = pair[-1];
      const int64_t start = (b - p.first_block) * kBlock;
      sums[b] = blend(
          {at(p.trace, p.trace_dtype, start), at(p.empty, p.empty_dtype, start), p.trace_dtype, p.empty_dtype,
           std::min(kBlock, p.n - start), float(alpha), float(1 - alpha)});
    }
  });
  Tensor stats = torch::stable::new_zeros(trace[0], {4}, ScalarType::Double);
  double* out = stats.mutable_data_ptr<double>();
  for (const BlendSums& s : sums) {
    out[0] += s.trace_sq, out[1] += s.empty_sq, out[2] += s.dot;
    out[3] += s.finite ? 0 : 1;
  }
  return stats;
}

}  // namespace
}  // namespace longtrace

STABLE_TORCH_LIBRARY_FRAGMENT(longtrace, m) {
  m.def("blend_gradients_(Tensor(a!)[] trace_grads, Tensor[] empty_grads, float alpha) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(longtrace, CPU, m) { m.impl("blend_gradients_", TORCH_BOX(&longtrace::blend_gradients_)); }
