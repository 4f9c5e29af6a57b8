// bf16 operands through vdpbf16ps: 12 x 32 accumulators, two products a lane and instruction.
#include "tile.h"

#include <immintrin.h>

#include <type_traits>

#include "vec.inc"

#include "tile.inc"

#include "softmax.inc"

namespace {

template <int Rows>
static inline void block(int64_t K, const Bf16* A, int64_t lda, const Bf16* panel, float* C, int64_t ldc, bool add) {
  __m512 c[Rows][2];
  for (int r = 0; r < Rows; ++r) c[r][0] = c[r][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < K; k += 2) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(panel + k * longtrace::kPanel);
    const __m512bh b1 = (__m512bh)_mm512_loadu_si512(panel + k * longtrace::kPanel + 32);
    for (int r = 0; r < Rows; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, A + r * lda + k, 4);
      const __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
      c[r][0] = _mm512_dpbf16_ps(c[r][0], a, b0);
      c[r][1] = _mm512_dpbf16_ps(c[r][1], a, b1);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < 2; ++v) {
      float* out = C + r * ldc + v * kLanes;
      _mm512_storeu_ps(out, add ? _mm512_add_ps(_mm512_loadu_ps(out), c[r][v]) : c[r][v]);
    }
}

static void multiply(
    int64_t rows, int64_t K, const void* A, int64_t lda, const void* panel, float* C, int64_t ldc, bool add) {
  const Bf16 *a = static_cast<const Bf16*>(A), *b = static_cast<const Bf16*>(panel);
  for (; rows >= 12; rows -= 12, a += 12 * lda, C += 12 * ldc) block<12>(K, a, lda, b, C, ldc, add);
  for (; rows >= 4; rows -= 4, a += 4 * lda, C += 4 * ldc) block<4>(K, a, lda, b, C, ldc, add);
  for (; rows > 0; --rows, a += lda, C += ldc) block<1>(K, a, lda, b, C, ldc, add);
}

}  // namespace

namespace longtrace {
const TileKernels tile_avx512_bf16 = {
    "avx512_bf16", true, 32, nullptr, nullptr, multiply, copy_rows<Bf16>, pack_transposed<Bf16>, pack<Bf16>, transpose<Bf16>,
    row_max<Bf16>, store_tile<Bf16>, epilogue<Bf16>, score_peaks<Bf16>, softmax<Bf16>, softmax_gradient<Bf16>};
}
