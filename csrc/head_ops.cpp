// The torch ops of the vocabulary head.
#include "ops.h"

#include <string>
#include <tuple>

#include "cpu/head.h"

namespace longtrace {
namespace {

struct Call {
  const TileKernels& k;
  Matrix h, weight;
  int64_t n, H, V;
  head::Transform transform;
  const int64_t* target;
};

Call head_call(
    const Tensor& h, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& target, double logit_scale,
    double softcap, double temperature) {
  const Matrix a = matrix(h, "h"), b = matrix(weight, "weight");
  const int64_t n = h.size(0), H = h.size(1), V = weight.size(0);
  STD_TORCH_CHECK(weight.size(1) == H && a.dtype == b.dtype, "h and weight must agree in width and dtype");
  const head::Transform t{float(logit_scale), float(softcap), float(temperature), vector(bias, V, "bias")};
  return {tile_kernels(a.dtype), a, b, n, H, V, t, indices(target, n, V, "target")};
}

ScalarType operand_type(const TileKernels& k) { return k.bf16 ? ScalarType::BFloat16 : ScalarType::Float; }

Tensor new_vector(const Tensor& like, int64_t size) { return torch::stable::new_empty(like, {size}, ScalarType::Float); }

// The chunk of probabilities to fill: fits c or is refused.
void* checked_g(const std::optional<Tensor>& g, const Call& c) {
  if (!g) return nullptr;
  STD_TORCH_CHECK(
      g->dim() == 2 && g->size(0) == c.V && g->size(1) == head::row_stride(c.n) && g->is_contiguous() &&
          g->scalar_type() == operand_type(c.k),
      "g must be contiguous (V, row stride of n) in the operand dtype: head_buffer makes one");
  return g->mutable_data_ptr();
}

// Uninitialised (V, row_stride(n)) in the operand dtype for `weight`; huge pages spare a page fault every 4 KB.
Tensor head_buffer(const Tensor& weight, int64_t n) {
  const TileKernels& k = tile_kernels(dtype_of(weight, "weight"));
  Tensor g = torch::stable::new_empty(weight, {weight.size(0), head::row_stride(n)}, operand_type(k));
  ask_huge_pages(g);
  return g;
}

const TileKernels& kernels_of(const Tensor& g) {
  const TileKernels& k = tile_kernels(g.scalar_type() == ScalarType::BFloat16 ? Dtype::bf16 : Dtype::fp32);
  STD_TORCH_CHECK(g.scalar_type() == operand_type(k) && g.dim() == 2 && g.stride(1) == 1, "g is not an operand matrix");
  return k;
}

// (maximum, log_sum, log_prob, entropy, mass, slope, scale), each (n,); entropy and mass are empty unless asked for. g as of
// head_buffer(weight, n) is filled when given.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> head_forward(
    const Tensor& h, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& target, double logit_scale,
    double softcap, double temperature, bool entropy, bool mass, const std::optional<Tensor>& g) {
  const Call c = head_call(h, weight, bias, target, logit_scale, softcap, temperature);
  STD_TORCH_CHECK(g || !mass, "mass needs g");
  Tensor maximum = new_vector(h, c.n), log_sum = new_vector(h, c.n), log_prob = new_vector(h, c.n);
  Tensor ent = new_vector(h, entropy ? c.n : 0), masses = new_vector(h, mass ? c.n : 0), slope = new_vector(h, c.n);
  Tensor scale = new_vector(h, c.n);
  const head::TokenStats out{
      maximum.mutable_data_ptr<float>(), log_sum.mutable_data_ptr<float>(), log_prob.mutable_data_ptr<float>(),
      entropy ? ent.mutable_data_ptr<float>() : nullptr, mass ? masses.mutable_data_ptr<float>() : nullptr, slope.mutable_data_ptr<float>(),
      scale.mutable_data_ptr<float>()};
  void* to = checked_g(g, c);
  if (c.n) head::forward(c.k, c.h, c.n, c.H, c.weight, c.V, c.transform, c.target, out, to, for_each);
  return {maximum, log_sum, log_prob, ent, masses, slope, scale};
}

// g = p (a - e (log p + entropy)) times the softcap's derivative, 0 at the targets.
void head_gradient_(
    const Tensor& g, const Tensor& h, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& target,
    double logit_scale, double softcap, double temperature, const Tensor& maximum, const Tensor& log_sum, const Tensor& a,
    const Tensor& e, const Tensor& entropy) {
  const Call c = head_call(h, weight, bias, target, logit_scale, softcap, temperature);
  const head::TokenCoefficients with{
      vector(maximum, c.n, "maximum"), vector(log_sum, c.n, "log_sum"), vector(a, c.n, "a"), vector(e, c.n, "e"),
      vector(entropy, c.n, "entropy")};
  void* to = checked_g(g, c);
  if (c.n) head::gradient(c.k, c.h, c.n, c.H, c.weight, c.V, c.transform, c.target, with, to, for_each);
}

// (n, N) fp32 = scale * g^T @ right[rows], right (V, N) with rows (F,) or all of its rows in order.
Tensor head_dh(
    const Tensor& g, const Tensor& right, const std::optional<Tensor>& rows, int64_t n, const std::optional<Tensor>& scale) {
  const TileKernels& k = kernels_of(g);
  Matrix m = matrix(right, "right");
  const int64_t F = g.size(0), N = right.size(1);
  if (rows) m.rows = indices(*rows, F, right.size(0), "rows");
  STD_TORCH_CHECK((rows || F == right.size(0)) && g.size(1) >= head::padded_tokens(n), "g does not fit right or n");
  Tensor out = torch::stable::new_empty(g, {n, N}, ScalarType::Float);
  if (n)
    head::dh(k, g.const_data_ptr(), g.stride(0), F, n, m, N, vector(scale, n, "scale"), out.mutable_data_ptr<float>(), for_each);
  return out;
}

// (n, N) fp32, N <= 32: head_dh of every `step`th panel of 32 tokens; the other rows are 0.
Tensor head_dh_sample(const Tensor& g, const Tensor& right, int64_t n, const Tensor& scale, int64_t step) {
  const TileKernels& k = kernels_of(g);
  const Matrix m = matrix(right, "right");
  const int64_t F = g.size(0), N = right.size(1);
  STD_TORCH_CHECK(F == right.size(0) && g.size(1) >= head::padded_tokens(n), "g does not fit right or n");
  STD_TORCH_CHECK(N <= kPanel && step > 0, "at most 32 columns, and a step of at least 1");
  Tensor out = torch::stable::new_zeros(g, {n, N}, ScalarType::Float);
  if (n)
    head::narrow_dh(
        k, g.const_data_ptr(), g.stride(0), F, n, m, N, vector(scale, n, "scale"), out.mutable_data_ptr<float>(), step, for_each);
  return out;
}

// out[rows] = or += g @ (scale * right), right (n, N), out fp32 (V, N); rows distinct, (F,), or all of out's in order.
void head_dw_(
    const Tensor& out, const Tensor& g, const Tensor& right, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& rows, bool add) {
  const TileKernels& k = kernels_of(g);
  const int64_t F = g.size(0), n = right.size(0), N = right.size(1);
  STD_TORCH_CHECK(
      out.dim() == 2 && out.size(1) == N && out.scalar_type() == ScalarType::Float && (out.stride(1) == 1 || N <= 1),
      "out must be fp32 rows as wide as right");
  STD_TORCH_CHECK((rows || F == out.size(0)) && g.size(1) >= head::padded_tokens(n), "g does not fit out or right");
  const int64_t* at = rows ? indices(*rows, F, out.size(0), "rows") : nullptr;
  if (F)
    head::dw(
        k, g.const_data_ptr(), g.stride(0), F, n, matrix(right, "right"), N, vector(scale, n, "scale"),
        out.mutable_data_ptr<float>(), out.stride(0), at, add, for_each);
}

// (F,) = max_i scale[i] g[v, i]
Tensor head_column_max(const Tensor& g, const Tensor& scale) {
  const TileKernels& k = kernels_of(g);
  const int64_t n = scale.size(0);
  STD_TORCH_CHECK(g.size(1) >= head::padded_tokens(n), "g does not fit scale");
  Tensor out = new_vector(g, g.size(0));
  head::column_max(
      k, g.const_data_ptr(), g.stride(0), g.size(0), n, vector(scale, n, "scale"), out.mutable_data_ptr<float>(), for_each);
  return out;
}

void ask_huge_pages_(const Tensor& x) { ask_huge_pages(x); }

std::string cpu_capability() { return tile_kernels(Dtype::bf16).name; }

}  // namespace
}  // namespace longtrace

STABLE_TORCH_LIBRARY(longtrace, m) {
  m.def(
      "head_forward(Tensor h, Tensor weight, Tensor? bias, Tensor target, float logit_scale, float softcap, "
      "float temperature, bool entropy, bool mass, Tensor(a!)? g) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "head_gradient_(Tensor(a!) g, Tensor h, Tensor weight, Tensor? bias, Tensor target, float logit_scale, "
      "float softcap, float temperature, Tensor maximum, Tensor log_sum, Tensor a, Tensor e, Tensor entropy) -> ()");
  m.def("ask_huge_pages_(Tensor(a!) x) -> ()");
  m.def("head_buffer(Tensor weight, int n) -> Tensor");
  m.def("head_dh_sample(Tensor g, Tensor right, int n, Tensor scale, int step) -> Tensor");
  m.def("head_dh(Tensor g, Tensor right, Tensor? rows, int n, Tensor? scale) -> Tensor");
  m.def("head_dw_(Tensor(a!) out, Tensor g, Tensor right, Tensor? scale, Tensor? rows, bool add) -> ()");
  m.def("head_column_max(Tensor g, Tensor scale) -> Tensor");
  m.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(longtrace, CPU, m) {
  m.impl("head_forward", TORCH_BOX(&longtrace::head_forward));
  m.impl("head_gradient_", TORCH_BOX(&longtrace::head_gradient_));
  m.impl("ask_huge_pages_", TORCH_BOX(&longtrace::ask_huge_pages_));
  m.impl("head_buffer", TORCH_BOX(&longtrace::head_buffer));
  m.impl("head_dh_sample", TORCH_BOX(&longtrace::head_dh_sample));
  m.impl("head_dh", TORCH_BOX(&longtrace::head_dh));
  m.impl("head_dw_", TORCH_BOX(&longtrace::head_dw_));
  m.impl("head_column_max", TORCH_BOX(&longtrace::head_column_max));
}

STABLE_TORCH_LIBRARY_IMPL(longtrace, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&longtrace::cpu_capability));
}
