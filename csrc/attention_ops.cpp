// The torch ops of packed attention.
#include "ops.h"

#include <tuple>

#include "cpu/attention.h"
#include "cpu/decode.h"

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

// out (T, heads, Dv): attention of documents of one query at most, whose keys and values may be views of larger rows
Tensor attention_decode(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& starts_q, const Tensor& starts_k, double scale, double softcap,
    int64_t left, const std::optional<Tensor>& sinks) {
  const Dtype dtype = dtype_of(q, "q");
  STD_TORCH_CHECK(dtype == Dtype::fp32 || dtype == Dtype::bf16, "q must be fp32 or bf16");
  for (const Tensor* x : {&q, &k, &v})
    STD_TORCH_CHECK(
        x->dim() == 3 && x->is_contiguous() && x->scalar_type() == q.scalar_type() && x->size(2) <= 256,
        "q, k and v must be contiguous (tokens, heads, width), width up to 256, of one dtype");
  STD_TORCH_CHECK(
      k.size(0) == v.size(0) && k.size(1) == v.size(1) && q.size(2) == k.size(2) && k.size(1) > 0 && q.size(1) % k.size(1) == 0 &&
          starts_q.size(0) == starts_k.size(0),
      "q, k, v and their documents do not fit");
  const int64_t *at_q = offsets(starts_q, q.size(0), "starts_q"), *at_k = offsets(starts_k, k.size(0), "starts_k");
  const int64_t heads = q.size(1), kv_heads = k.size(1), D = q.size(2), Dv = v.size(2), size = dtype == Dtype::bf16 ? 2 : 4;
  const int64_t group = heads / kv_heads;
  const float* sink = vector(sinks, heads, "sinks");
  std::vector<int64_t> documents;
  for (int64_t i = 0; i + 1 < starts_q.size(0); ++i) {
    STD_TORCH_CHECK(at_q[i + 1] - at_q[i] <= 1, "document ", i, " has more than one query");
    if (at_q[i + 1] > at_q[i]) documents.push_back(i);
  }
  Tensor out = torch::stable::new_empty(q, {q.size(0), heads, Dv});
  const char *q_data = static_cast<const char*>(q.const_data_ptr()), *k_data = static_cast<const char*>(k.const_data_ptr()),
             *v_data = static_cast<const char*>(v.const_data_ptr());
  char* out_data = static_cast<char*>(out.mutable_data_ptr());
  const DecodeKernel kernel = decode_kernel();
  for_pieces(int64_t(documents.size()) * kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t document = documents[n / kv_heads], kv = n % kv_heads, row = at_q[document] * heads + kv * group;
      int64_t first = at_k[document], last = at_k[document + 1];
      if (left >= 0) first = std::max(first, last - 1 - left);
      const int64_t key = first * kv_heads + kv;
      kernel({q_data + row * D * size, k_data + key * D * size, v_data + key * Dv * size, out_data + row * Dv * size, dtype, group, D,
              Dv, last - first, kv_heads * D, kv_heads * Dv, float(scale), float(softcap), sink ? sink + kv * group : nullptr});
    }
  });
  return out;
}

}  // namespace
}  // namespace longtrace

STABLE_TORCH_LIBRARY_FRAGMENT(longtrace, m) {
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor starts_q, Tensor starts_k, float scale, float softcap, bool causal, "
      "int left, int right, Tensor? sinks) -> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_decode(Tensor q, Tensor k, Tensor v, Tensor starts_q, Tensor starts_k, float scale, float softcap, int left, "
      "Tensor? sinks) -> Tensor");
  m.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor reference, Tensor log_sum, "
      "Tensor starts_q, Tensor starts_k, float scale, float softcap, bool causal, int left, int right) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(longtrace, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&longtrace::attention_forward));
  m.impl("attention_decode", TORCH_BOX(&longtrace::attention_decode));
  m.impl("attention_backward", TORCH_BOX(&longtrace::attention_backward));
}
