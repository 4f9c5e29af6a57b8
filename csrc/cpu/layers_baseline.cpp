#include "layers.h"

#include <cmath>

#include "vec.inc"

#include "lanes.inc"

#include "layers.inc"

namespace longtrace {
const LayerKernels layers_baseline = {"baseline", rms_norm, rms_norm_backward, rope, glu, glu_backward};
}
