// The torch ops of a linear layer whose weight is packed once and used many times: decoding, where every step multiplies a few
// rows with all weights. A row's result depends neither on how many rows there are nor on the threads.
#include "ops.h"

namespace longtrace {
namespace {

constexpr int64_t kRows = 128;  // rows of x that stay in the L2 cache while the panels pass by
constexpr int64_t kTile = 16;   // x is filled up with zero rows: whole tiles need no setting up
constexpr int64_t kPiece = 2;   // panels handed out at once

// Panels of weight (N, K), bf16 or fp32: (panels, K padded, 32) operands.
Tensor pack_weight(const Tensor& weight) {
  const Matrix from = matrix(weight, "weight");
  const TileKernels& k = tile_kernels(from.dtype);
  STD_TORCH_CHECK(from.dtype == (k.bf16 ? Dtype::bf16 : Dtype::fp32), "this processor's tiles take no such weight");
  const int64_t N = weight.size(0), K = weight.size(1), K_padded = round_up(K, k.k_step), panels = (N + kPanel - 1) / kPanel;
  Tensor out = torch::stable::new_empty(weight, {panels, K_padded, kPanel});
  ask_huge_pages(out);
  const int64_t size = k.bf16 ? 2 : 4;
  char* to = static_cast<char*>(out.mutable_data_ptr());
  for_each(panels, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      Matrix part = from;
      part.data = static_cast<const char*>(from.data) + p * kPanel * from.stride * size;
      k.pack_transposed(part, std::min(kPanel, N - p * kPanel), K, K_padded, to + p * K_padded * kPanel * size);
    }
  });
  return out;
}

// x (n, K) times the transpose of a packed weight (N, K), plus bias (N,) fp32: (n, N) in x's dtype, or fp32. Sums are fp32.
Tensor packed_linear(const Tensor& x, const Tensor& packed, int64_t N, const std::optional<Tensor>& bias, bool fp32) {
  const Matrix a = matrix(x, "x");
  const TileKernels& k = tile_kernels(a.dtype);
  const int64_t n = x.size(0), K = x.size(1), K_padded = round_up(K, k.k_step), panels = (N + kPanel - 1) / kPanel;
  STD_TORCH_CHECK(
      a.dtype == (k.bf16 ? Dtype::bf16 : Dtype::fp32) && packed.scalar_type() == x.scalar_type() && packed.is_contiguous() &&
          packed.dim() == 3 && packed.size(0) == panels && packed.size(1) == K_padded && packed.size(2) == kPanel,
      "x and the packed weight do not fit");
  const float* add = vector(bias, N, "bias");
  Tensor out = torch::stable::new_empty(x, {n, N}, fp32 ? ScalarType::Float : x.scalar_type());
  const int64_t size = k.bf16 ? 2 : 4, out_size = fp32 ? 4 : size;
  const char* weight = static_cast<const char*>(packed.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t first = 0; first < n; first += kRows) {
    const int64_t rows = std::min(kRows, n - first), whole = round_up(rows, kTile);
    const void* A = static_cast<const char*>(a.data) + first * a.stride * size;
    int64_t lda = a.stride;
    Buffer copy;
    if (rows != whole || K != K_padded) {
      copy = scratch(whole * K_padded * size), A = copy.get(), lda = K_padded;
      k.copy_rows(a, first, rows, K, copy.get(), K_padded);
      std::fill_n(copy.get() + rows * K_padded * size, (whole - rows) * K_padded * size, 0);
    }
    for_pieces(panels, kPiece, [&](int64_t begin, int64_t end) {
      const Session session(k);
      alignas(64) float tile[kRows * kPanel], shift[kPanel] = {};
      for (int64_t p = begin; p < end; ++p) {
        const int64_t columns = std::min(kPanel, N - p * kPanel);
        if (add) std::copy_n(add + p * kPanel, columns, shift);
        k.multiply(whole, K_padded, A, lda, weight + p * K_padded * kPanel * size, tile, kPanel, false);
        k.store(tile, rows, columns, add ? shift : nullptr, to + (first * N + p * kPanel) * out_size, N, fp32);
      }
    });
  }
  return out;
}

}  // namespace
}  // namespace longtrace

STABLE_TORCH_LIBRARY_FRAGMENT(longtrace, m) {
  m.def("pack_weight(Tensor weight) -> Tensor");
  m.def("packed_linear(Tensor x, Tensor packed, int columns, Tensor? bias, bool fp32) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(longtrace, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&longtrace::pack_weight));
  m.impl("packed_linear", TORCH_BOX(&longtrace::packed_linear));
}
