// Which decode kernel this processor runs: that of its tiles.
#include "decode.h"

namespace longtrace {

DecodeKernel decode_kernel() {
#if defined(__x86_64__)
  const TileKernels& tiles = tile_kernels(Dtype::fp32);
  return &tiles == &tile_avx512 ? decode_avx512 : &tiles == &tile_avx2 ? decode_avx2 : decode_baseline;
#else
  return decode_baseline;
#endif
}

}  // namespace longtrace
