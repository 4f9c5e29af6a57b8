#include "softmax.h"

#include "softmax.inc"

namespace longtrace {
const SoftmaxKernels softmax_baseline = {"baseline", stats, dlogits};
}
