#include "layers.h"

#include <cmath>

#include "vec.inc"

#include "lanes.inc"

#include "layers.inc"

namespace longtrace {
const LayerKernels layers_avx512_bf16 = {"avx512_bf16", rms_norm, rms_norm_backward, rope, glu, glu_backward};
}
