#include "softmax.h"

#include "softmax.inc"

namespace longtrace {
const SoftmaxKernels softmax_avx2 = {"avx2", stats, dlogits};
}
