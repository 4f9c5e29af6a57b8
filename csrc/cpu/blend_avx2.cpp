#include "blend.h"

#include "blend.inc"

namespace longtrace {
const BlendKernel blend_avx2 = blend;
}
