#include "layers.h"

#include <cmath>

#include "vec.inc"

#include "lanes.inc"

#include "layers.inc"

namespace longtrace {
const LayerKernels layers_avx512 = {"avx512", rms_norm, rms_norm_backward, rope, glu, glu_backward};
}
