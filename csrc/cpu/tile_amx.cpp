// bf16 operands through tdpbf16ps: 32 x 32 accumulators in four tiles of 16 x 16, 32 products a step.
#include "tile.h"

#include <immintrin.h>

#include <type_traits>

#include "vec.inc"

#include "tile.inc"

#include "softmax.inc"

namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row of tile i
  uint8_t rows[16] = {};
};

// Tiles: C 0-3, A 4-5 (`first` and `second` rows), B 6-7.
static void configure(int64_t first, int64_t second) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
  config.rows[0] = config.rows[1] = config.rows[4] = uint8_t(first);
  config.rows[2] = config.rows[3] = config.rows[5] = uint8_t(second ? second : 1);
  asm volatile("" ::"r"(&config) : "memory");  // GCC bug 114098: ldtilecfg is not seen to read all of it
  _tile_loadconfig(&config);
}

constexpr int64_t kAhead = 8;  // steps of a panel fetched ahead where it is read once

// A and B advance 32 k a step; a lower half of no rows computes nothing. Fetch: the panel comes from memory.
template <bool Lower, bool Fetch = false>
static inline void block(int64_t K, const Bf16* A, int64_t lda, const Bf16* panel, float* C, int64_t ldc, bool add) {
  const int64_t row = lda * 2, out = ldc * 4;
  const Bf16* low = A + 16 * lda;
  float* c = C + 16 * ldc;
  if (add) {
    _tile_loadd(0, C, out);
    _tile_loadd(1, C + 16, out);
    if (Lower) {
      _tile_loadd(2, c, out);
      _tile_loadd(3, c + 16, out);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < K; k += 32) {
    const Bf16* b = panel + k * longtrace::kPanel;
    if (Fetch)
      for (int64_t line = 0; line < 32; ++line) _mm_prefetch(b + 1024 * kAhead + 32 * line, _MM_HINT_T0);
    _tile_loadd(4, A + k, row);  // products start as soon as two tiles are there
    _tile_loadd(6, b, 128);
    _tile_dpbf16ps(0, 4, 6);
    if (Lower) {
      _tile_loadd(5, low + k, row);
      _tile_dpbf16ps(2, 5, 6);
    }
    _tile_loadd(7, b + 32, 128);
    _tile_dpbf16ps(1, 4, 7);
    if (Lower) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, C, out);
  _tile_stored(1, C + 16, out);
  if (Lower) {
    _tile_stored(2, c, out);
    _tile_stored(3, c + 16, out);
  }
}

// K = 64, as attention's scores have it: the panel stays in four tiles while 16 rows after 16 pass by.
static inline void rows_of_64(int64_t rows, const Bf16* A, int64_t lda, const Bf16* panel, float* C, int64_t ldc) {
  _tile_loadd(4, panel, 128);
  _tile_loadd(5, panel + 32, 128);
  _tile_loadd(6, panel + 32 * longtrace::kPanel, 128);
  _tile_loadd(7, panel + 32 * longtrace::kPanel + 32, 128);
  for (; rows >= 16; rows -= 16, A += 16 * lda, C += 16 * ldc) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(2, A, lda * 2);
    _tile_dpbf16ps(0, 2, 4);
    _tile_dpbf16ps(1, 2, 5);
    _tile_loadd(3, A + 32, lda * 2);
    _tile_dpbf16ps(0, 3, 6);
    _tile_dpbf16ps(1, 3, 7);
    _tile_stored(0, C, ldc * 4);
    _tile_stored(1, C + 16, ldc * 4);
  }
}

static void enter(void* before) {  // whoever set the tiles up last (oneDNN remembers that it did) finds them so again
  _tile_storeconfig(before);
  asm volatile("" ::"r"(before) : "memory");
  configure(16, 16);
}

static void leave(const void* before) {
  if (*static_cast<const uint8_t*>(before))
    _tile_loadconfig(before);
  else
    _tile_release();
}

static void multiply(
    int64_t rows, int64_t K, const void* A, int64_t lda, const void* panel, float* C, int64_t ldc, bool add) {
  const Bf16 *a = static_cast<const Bf16*>(A), *b = static_cast<const Bf16*>(panel);
  if (K == 64 && !add) {
    const int64_t whole = rows / 16 * 16;
    rows_of_64(whole, a, lda, b, C, ldc);
    rows -= whole, a += whole * lda, C += whole * ldc;
  }
  if (rows >= 32 && rows < 64) {
    block<true, true>(K, a, lda, b, C, ldc, add);
    rows -= 32, a += 32 * lda, C += 32 * ldc;
  }
  for (; rows >= 32; rows -= 32, a += 32 * lda, C += 32 * ldc) block<true>(K, a, lda, b, C, ldc, add);
  if (rows == 16) return block<false, true>(K, a, lda, b, C, ldc, add);
  if (!rows) return;
  if (rows > 16) {
    configure(16, rows - 16);
    block<true>(K, a, lda, b, C, ldc, add);
  } else {
    configure(rows, 0);
    block<false>(K, a, lda, b, C, ldc, add);
  }
  configure(16, 16);
}

}  // namespace

namespace longtrace {
const TileKernels tile_amx = {
    "amx", true, 32, enter, leave, multiply, copy_rows<Bf16>, pack_transposed<Bf16>, pack<Bf16>, transpose<Bf16>,
    row_max<Bf16>, store_tile<Bf16>, epilogue<Bf16>, score_peaks<Bf16>, softmax<Bf16>, softmax_gradient<Bf16>};
}
