// Which blend kernel this processor runs: that of its tiles.
#include "blend.h"

namespace longtrace {

BlendKernel blend_kernel() {
#if defined(__x86_64__)
  const TileKernels& tiles = tile_kernels(Dtype::fp32);
  return &tiles == &tile_avx512 ? blend_avx512 : &tiles == &tile_avx2 ? blend_avx2 : blend_baseline;
#else
  return blend_baseline;
#endif
}

}  // namespace longtrace
