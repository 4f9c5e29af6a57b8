#include "tile.h"

#include <type_traits>

#include "vec.inc"

#include "tile.inc"

namespace {
constexpr int kWidth = 8, kVectors = 2, kRows = 6;
}

#include "tile_fp32.inc"

#include "softmax.inc"

namespace longtrace {
const TileKernels tile_avx2 = {
    "avx2", false, 1, nullptr, nullptr, multiply, copy_rows<float>, pack_transposed<float>, pack<float>, transpose<float>,
    row_max<float>, store_tile<float>, epilogue<float>, score_peaks<float>, softmax<float>, softmax_gradient<float>};
}
