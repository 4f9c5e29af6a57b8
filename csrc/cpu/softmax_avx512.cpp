#include "softmax.h"

#include "softmax.inc"

namespace longtrace {
const SoftmaxKernels softmax_avx512 = {"avx512", stats, dlogits};
}
