// Which version of the row-wise passes this processor runs.
#include "softmax.h"

namespace longtrace {

const SoftmaxKernels& softmax_kernels() {
#if defined(__x86_64__)
  static const SoftmaxKernels& best = [&]() -> const SoftmaxKernels& {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      return softmax_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return softmax_avx2;
    return softmax_baseline;
  }();
  return best;
#else
  return softmax_baseline;
#endif
}

}  // namespace longtrace
