// Which layer kernels this processor runs: those of its tiles.
#include "layers.h"

namespace longtrace {

const LayerKernels& layer_kernels() {
#if defined(__x86_64__)
  const TileKernels& tiles = tile_kernels(Dtype::bf16);
  if (tiles.bf16) return layers_avx512_bf16;
  return &tiles == &tile_avx512 ? layers_avx512 : &tiles == &tile_avx2 ? layers_avx2 : layers_baseline;
#else
  return layers_baseline;
#endif
}

}  // namespace longtrace
