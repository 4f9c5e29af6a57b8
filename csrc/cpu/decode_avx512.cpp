#include "decode.h"

#include <cmath>

#include "vec.inc"

#include "lanes.inc"

#include "decode.inc"

namespace longtrace {
const DecodeKernel decode_avx512 = decode;
}
