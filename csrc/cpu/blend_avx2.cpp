#include "blend.h"

#include <cmath>

#include "vec.inc"

#include "lanes.inc"

#include "blend.inc"

namespace longtrace {
const BlendKernel blend_avx2 = blend;
}
