// The torch ops of the layers (cpu/layers.h): shapes checked, outputs made, rows handed out to threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/layers.h"
#include "ops.h"

namespace longtrace {
namespace {

// A (rows, columns) matrix of `dtype`, fp32 or bf16.
Matrix checked(const Tensor& x, Dtype dtype, int64_t rows, int64_t columns, const char* name) {
  const Matrix m = matrix(x, name);
  STD_TORCH_CHECK(
      x.size(0) == rows && x.size(1) == columns && m.dtype == dtype && dtype != Dtype::fp16, name, " must be (", rows,
      ", ", columns, "), fp32 or bf16 like the others");
  return m;
}

const void* checked_weight(const Tensor& weight, Dtype dtype, int64_t H) {
  STD_TORCH_CHECK(
      weight.dim() == 1 && weight.size(0) == H && weight.is_contiguous() && dtype_of(weight, "weight") == dtype,
      "weight must be a contiguous vector of ", H, " in x's dtype");
  return weight.const_data_ptr();
}

Tensor new_matrix(const Tensor& like, int64_t rows, int64_t columns) {
  Tensor out = torch::stable::new_empty(like, {rows, columns}, like.scalar_type());
  ask_huge_pages(out);
  return out;
}

// (y, x + residual or empty, 1 / rms of each row in fp32); x and residual (n, H).
std::tuple<Tensor, Tensor, Tensor> rms_norm(
    const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, double eps, double offset) {
  const Dtype dtype = dtype_of(x, "x");
  const int64_t n = x.size(0), H = x.size(1);
  const Matrix a = checked(x, dtype, n, H, "x");
  const Matrix b = residual ? checked(*residual, dtype, n, H, "residual") : Matrix{nullptr, dtype, 0};
  Tensor y = new_matrix(x, n, H), sum = new_matrix(x, residual ? n : 0, H);
  Tensor scale = torch::stable::new_empty(x, {n}, ScalarType::Float);
  const RmsNorm call{
      dtype, H, eps, float(offset), a.data, b.data, checked_weight(weight, dtype, H), a.stride, b.stride,
      y.mutable_data_ptr(), sum.mutable_data_ptr(), scale.mutable_data_ptr<float>()};
  const LayerKernels& k = layer_kernels();
  for_each(n, [&](int64_t begin, int64_t end) { k.rms_norm(call, begin, end); });
  return {y, sum, scale};
}

// (dx, dweight in fp32, or empty unless asked for). dsum: the gradient of x + residual.
std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& dy, const std::optional<Tensor>& dsum, const Tensor& x, const Tensor& scale, const Tensor& weight,
    double offset, bool needs_dweight) {
  const Dtype dtype = dtype_of(x, "x");
  const int64_t n = x.size(0), H = x.size(1);
  const Matrix a = checked(x, dtype, n, H, "x"), d = checked(dy, dtype, n, H, "dy");
  const Matrix s = dsum ? checked(*dsum, dtype, n, H, "dsum") : Matrix{nullptr, dtype, 0};
  Tensor dx = new_matrix(x, n, H), dweight = torch::stable::new_empty(x, {needs_dweight ? H : 0}, ScalarType::Float);
  const RmsNormBackward call{
      dtype, H, float(offset), d.data, s.data, a.data, checked_weight(weight, dtype, H), vector(scale, n, "scale"),
      d.stride, s.stride, a.stride, dx.mutable_data_ptr()};
  const LayerKernels& k = layer_kernels();
  // Blocks depend on n alone, and their sums are added in order: dweight's bits do not depend on the threads.
  const int64_t block = std::max<int64_t>(64, (n + 255) / 256), blocks = (n + block - 1) / block;
  Tensor partial = torch::stable::new_zeros(x, {needs_dweight ? blocks : 0, H}, ScalarType::Double);
  double* sums = partial.mutable_data_ptr<double>();
  for_each(blocks, [&](int64_t begin, int64_t end) {
    std::vector<float> run(size_t(needs_dweight ? H : 0), 0.0f);
    for (int64_t i = begin; i < end; ++i)
      k.rms_norm_backward(call, i * block, std::min(n, (i + 1) * block), run.data(), needs_dweight ? sums + i * H : nullptr);
  });
  if (needs_dweight) {
    float* out = dweight.mutable_data_ptr<float>();
    for_each(H, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h) {
        double total = 0;
        for (int64_t i = 0; i < blocks; ++i) total += sums[i * H + h];
        out[h] = float(total);
      }
    });
  }
  return {dx, dweight};
}

Rope rope_call(const Tensor& x, const Tensor& cos, const Tensor& sin, int64_t rotary_dim, bool backward, Tensor& y) {
  STD_TORCH_CHECK(
      x.dim() == 3 && (x.stride(2) == 1 || x.size(2) <= 1) && rotary_dim % 2 == 0 && rotary_dim >= 0 &&
          rotary_dim <= x.size(2),
      "q and k must be (T, heads, D) with dense heads, and the rotary dimension even and at most D");
  const Dtype dtype = dtype_of(x, "q and k");
  const int64_t width = cos.size(1), half = rotary_dim / 2;
  STD_TORCH_CHECK(width == rotary_dim || width == half, "cos and sin must have rotary_dim columns, or half as many");
  const Matrix c = checked(cos, dtype, x.size(0), width, "cos"), s = checked(sin, dtype, x.size(0), width, "sin");
  y = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  ask_huge_pages(y);
  return {
      dtype, x.size(1), x.size(2), half, x.const_data_ptr(), c.data, s.data, x.stride(0), x.stride(1), c.stride, s.stride,
      width == rotary_dim ? half : 0, backward, y.mutable_data_ptr()};
}

std::tuple<Tensor, Tensor> rope(
    const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, int64_t rotary_dim, bool backward) {
  STD_TORCH_CHECK(q.size(0) == k.size(0), "q and k must have the same rows");
  Tensor q_out = q, k_out = k;
  const Rope calls[2] = {
      rope_call(q, cos, sin, rotary_dim, backward, q_out), rope_call(k, cos, sin, rotary_dim, backward, k_out)};
  const LayerKernels& kernels = layer_kernels();
  for_each(q.size(0), [&](int64_t begin, int64_t end) {
    for (const Rope& call : calls) kernels.rope(call, begin, end);
  });
  return {q_out, k_out};
}

Glu glu_call(const Tensor& gate, const Tensor& up, bool gelu) {
  const Dtype dtype = dtype_of(gate, "gate");
  const int64_t n = gate.size(0), I = gate.size(1);
  const Matrix g = checked(gate, dtype, n, I, "gate"), u = checked(up, dtype, n, I, "up");
  return {dtype, I, gelu, g.data, u.data, nullptr, g.stride, u.stride, 0, nullptr, nullptr, nullptr};
}

// act(gate) * up, (n, I)
Tensor glu(const Tensor& gate, const Tensor& up, bool gelu) {
  Glu call = glu_call(gate, up, gelu);
  Tensor out = new_matrix(gate, gate.size(0), call.columns);
  call.out = out.mutable_data_ptr();
  const LayerKernels& k = layer_kernels();
  for_each(gate.size(0), [&](int64_t begin, int64_t end) { k.glu(call, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> glu_backward(const Tensor& dy, const Tensor& gate, const Tensor& up, bool gelu) {
  Glu call = glu_call(gate, up, gelu);
  const Matrix d = checked(dy, call.dtype, gate.size(0), call.columns, "dy");
  Tensor dgate = new_matrix(gate, gate.size(0), call.columns), dup = new_matrix(gate, gate.size(0), call.columns);
  call.dy = d.data, call.ld_dy = d.stride;
  call.dgate = dgate.mutable_data_ptr(), call.dup = dup.mutable_data_ptr();
  const LayerKernels& k = layer_kernels();
  for_each(gate.size(0), [&](int64_t begin, int64_t end) { k.glu_backward(call, begin, end); });
  return {dgate, dup};
}

}  // namespace
}  // namespace longtrace

STABLE_TORCH_LIBRARY_FRAGMENT(longtrace, m) {
  m.def("rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps, float offset) -> (Tensor, Tensor, Tensor)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor? dsum, Tensor x, Tensor scale, Tensor weight, float offset, "
      "bool needs_dweight) -> (Tensor, Tensor)");
  m.def("rope(Tensor q, Tensor k, Tensor cos, Tensor sin, int rotary_dim, bool backward) -> (Tensor, Tensor)");
  m.def("glu(Tensor gate, Tensor up, bool gelu) -> Tensor");
  m.def("glu_backward(Tensor dy, Tensor gate, Tensor up, bool gelu) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(longtrace, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&longtrace::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&longtrace::rms_norm_backward));
  m.impl("rope", TORCH_BOX(&longtrace::rope));
  m.impl("glu", TORCH_BOX(&longtrace::glu));
  m.impl("glu_backward", TORCH_BOX(&longtrace::glu_backward));
}
