// The torch ops of longtrace through LibTorch's stable ABI: one binary serves torch 2.11 and later, any Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "cpu/softmax.h"

namespace longtrace {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows handed to a thread at least: about 16k logits, so that tiny vocabularies do not pay for the fork.
int64_t row_grain(int64_t V) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(V, 1)); }

void check_logits(const Tensor& logits, const Tensor& target) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.scalar_type() == ScalarType::Float, "logits must be (rows, V) fp32");
  STD_TORCH_CHECK(logits.size(1) > 0 && (logits.stride(1) == 1 || logits.size(1) == 1), "logits must be dense rows");
  STD_TORCH_CHECK(
      target.dim() == 1 && target.size(0) == logits.size(0) && target.scalar_type() == ScalarType::Long &&
          target.is_contiguous(),
      "target must be (rows,) int64");
}

const float* row_vector(const Tensor& x, int64_t rows, const char* name) {
  STD_TORCH_CHECK(
      x.dim() == 1 && x.size(0) == rows && x.scalar_type() == ScalarType::Float && x.is_contiguous(),
      name, " must be a contiguous (rows,) fp32");
  return x.const_data_ptr<float>();
}

int64_t checked_target(int64_t target, int64_t V) {
  STD_TORCH_CHECK(target >= 0 && target < V, "target ", target, " is not in [0, ", V, ")");
  return target;
}

// (maximum, log_sum, log_prob, entropy), each (rows,); entropy is (0,) unless asked for.
std::tuple<Tensor, Tensor, Tensor, Tensor> softmax_stats(const Tensor& logits, const Tensor& target, bool entropy) {
  check_logits(logits, target);
  const int64_t rows = logits.size(0), V = logits.size(1), stride = logits.stride(0);
  Tensor maximum = torch::stable::new_empty(logits, {rows}), log_sum = torch::stable::new_empty(logits, {rows});
  Tensor log_prob = torch::stable::new_empty(logits, {rows});
  Tensor ent = torch::stable::new_empty(logits, {entropy ? rows : 0});
  const float* z = logits.const_data_ptr<float>();
  const int64_t* y = target.const_data_ptr<int64_t>();
  float *m = maximum.mutable_data_ptr<float>(), *s = log_sum.mutable_data_ptr<float>();
  float *p = log_prob.mutable_data_ptr<float>(), *h = ent.mutable_data_ptr<float>();
  const SoftmaxKernels& kernels = softmax_kernels();
  for (int64_t i = 0; i < rows; ++i) checked_target(y[i], V);
  torch::stable::parallel_for(0, rows, row_grain(V), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const RowStats out = kernels.stats(z + i * stride, V, y[i], entropy);
      m[i] = out.maximum, s[i] = out.log_sum, p[i] = out.log_prob;
      if (entropy) h[i] = out.entropy;
    }
  });
  return {maximum, log_sum, log_prob, ent};
}

// logits <- a p - b 1[v = target] - e p (log p + entropy), in place; e comes with entropy or not at all.
void dlogits_(
    const Tensor& logits,
    const Tensor& target,
    const Tensor& maximum,
    const Tensor& log_sum,
    const Tensor& a,
    const Tensor& b,
    const std::optional<Tensor>& entropy,
    const std::optional<Tensor>& e) {
  check_logits(logits, target);
  const int64_t rows = logits.size(0), V = logits.size(1), stride = logits.stride(0);
  STD_TORCH_CHECK(e.has_value() <= entropy.has_value(), "e needs entropy");
  const float *m = row_vector(maximum, rows, "maximum"), *s = row_vector(log_sum, rows, "log_sum");
  const float *pa = row_vector(a, rows, "a"), *pb = row_vector(b, rows, "b");
  const float* h = e ? row_vector(*entropy, rows, "entropy") : nullptr;
  const float* pe = e ? row_vector(*e, rows, "e") : nullptr;
  float* z = logits.mutable_data_ptr<float>();
  const int64_t* y = target.const_data_ptr<int64_t>();
  const SoftmaxKernels& kernels = softmax_kernels();
  for (int64_t i = 0; i < rows; ++i) checked_target(y[i], V);
  torch::stable::parallel_for(0, rows, row_grain(V), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels.dlogits(z + i * stride, V, y[i], {m[i], s[i], 0, pe ? h[i] : 0}, pa[i], pb[i], pe ? pe[i] : 0);
  });
}

std::string cpu_capability() { return softmax_kernels().name; }

}  // namespace
}  // namespace longtrace

STABLE_TORCH_LIBRARY(longtrace, m) {
  m.def("softmax_stats(Tensor logits, Tensor target, bool entropy) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "dlogits_(Tensor(a!) logits, Tensor target, Tensor maximum, Tensor log_sum, Tensor a, Tensor b, "
      "Tensor? entropy, Tensor? e) -> ()");
  m.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(longtrace, CPU, m) {
  m.impl("softmax_stats", TORCH_BOX(&longtrace::softmax_stats));
  m.impl("dlogits_", TORCH_BOX(&longtrace::dlogits_));
}

STABLE_TORCH_LIBRARY_IMPL(longtrace, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&longtrace::cpu_capability));
}
