// The torch ops of packed attention.
#include "ops.h"

#include <tuple>

#include "cpu/attention.h"

namespace longtrace {
namespace {

void check_packed(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(
      x.dim() == 3 && x.is_contiguous() && x.scalar_type() == like.scalar_type() && x.size(2) % kPanel == 0, name,
      " must be contiguous (tokens, heads, width), width a multiple of 32, of q's dtype");
}

const int64_t* offsets(const Tensor& x, int64_t total, const char* name) {
  STD_TORCH_CHECK(
      x.dim() == 1 && x.size(0) > 0 && x.scalar_type() == ScalarType::Long && x.is_contiguous(), name,
      " must be contiguous int64 offsets");
  const int64_t* at = x.const_data_ptr<int64_t>();
  const int64_t count = x.size(0);
  STD_TORCH_CHECK(at[0] == 0 && at[count - 1] == total && std::is_sorted(at, at + count), name, " must rise from 0 to ", total);
  return at;
}

const TileKernels& kernels_for(const Tensor& q) {
  const Dtype dtype = dtype_of(q, "q");
  const TileKernels& k = tile_kernels(dtype);
  STD_TORCH_CHECK(dtype == (k.bf16 ? Dtype::bf16 : Dtype::fp32), "this processor's kernels take fp32");
  return k;
}

attention::Problem problem_of(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& starts_q, const Tensor& starts_k, double scale, double softcap,
    bool causal, int64_t left, int64_t right, const std::optional<Tensor>& sinks) {
  check_packed(q, q, "q");
  check_packed(k, q, "k");
  check_packed(v, q, "v");
  STD_TORCH_CHECK(
      k.size(0) == v.size(0) && k.size(1) == v.size(1) && q.size(2) == k.size(2) && k.size(1) > 0 && q.size(1) % k.size(1) == 0 &&
          starts_q.size(0) == starts_k.size(0),
      "q, k, v and their documents do not fit");
  return {
      q.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(), q.size(1), k.size(1), q.size(2), v.size(2), starts_q.size(0) - 1,
      offsets(starts_q, q.size(0), "starts_q"), offsets(starts_k, k.size(0), "starts_k"), float(scale), float(softcap), causal, left,
      right, vector(sinks, q.size(1), "sinks")};
}

// out (T, heads, Dv) and the log-sums of the softmax, in powers of two, in two parts: reference + log_sum, (T, heads) fp32
std::tuple<Tensor, Tensor, Tensor> attention_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& starts_q, const Tensor& starts_k, double scale, double softcap,
    bool causal, int64_t left, int64_t right, const std::optional<Tensor>& sinks) {
  const attention::Problem problem = problem_of(q, k, v, starts_q, starts_k, scale, softcap, causal, left, right, sinks);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), v.size(2)});
  Tensor reference = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  Tensor log_sum = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  attention::forward(
      kernels_for(q), problem, out.mutable_data_ptr(), reference.mutable_data_ptr<float>(), log_sum.mutable_data_ptr<float>(),
      [](int64_t count, const auto& f) { for_pieces(count, 1, f); });
  return {out, reference, log_sum};
}

// (dq, dk, dv, delta (T, heads) fp32)
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& reference,
    const Tensor& log_sum, const Tensor& starts_q, const Tensor& starts_k, double scale, double softcap, bool causal, int64_t left, int64_t right) {
  const attention::Problem problem = problem_of(q, k, v, starts_q, starts_k, scale, softcap, causal, left, right, std::nullopt);
  check_packed(grad, q, "grad");
  check_packed(out, q, "out");
  STD_TORCH_CHECK(
      grad.size(0) == q.size(0) && grad.size(1) == q.size(1) && grad.size(2) == v.size(2) && out.size(0) == q.size(0) &&
          out.size(1) == q.size(1) && out.size(2) == v.size(2),
      "grad and out do not fit q and v");
  for (const Tensor* x : {&reference, &log_sum})
    STD_TORCH_CHECK(
        x->dim() == 2 && x->size(0) == q.size(0) && x->size(1) == q.size(1) && x->scalar_type() == ScalarType::Float && x->is_contiguous(),
        "reference and log_sum must be contiguous fp32 (tokens, heads)");
  Tensor dq = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor dk = torch::stable::new_empty(k, {k.size(0), k.size(1), k.size(2)});
  Tensor dv = torch::stable::new_empty(v, {v.size(0), v.size(1), v.size(2)});
  Tensor delta = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  attention::backward(
      kernels_for(q), problem, out.const_data_ptr(), grad.const_data_ptr(), reference.const_data_ptr<float>(),
      log_sum.const_data_ptr<float>(), delta.mutable_data_ptr<float>(),
      dq.mutable_data_ptr(), dk.mutable_data_ptr(), dv.mutable_data_ptr(),
      [](int64_t count, const auto& f) { for_pieces(count, 1, f); });
  return {dq, dk, dv, delta};
}

}  // namespace
}  // namespace longtrace

STABLE_TORCH_LIBRARY_FRAGMENT(longtrace, m) {
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor starts_q, Tensor starts_k, float scale, float softcap, bool causal, "
      "int left, int right, Tensor? sinks) -> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor reference, Tensor log_sum, "
      "Tensor starts_q, Tensor starts_k, float scale, float softcap, bool causal, int left, int right) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(longtrace, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&longtrace::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&longtrace::attention_backward));
}
