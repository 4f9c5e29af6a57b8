// Which version of the row-wise passes this processor runs; LONGTRACE_CPU_CAPABILITY=baseline|avx2 asks for a narrower one.
#include "softmax.h"

#include <cstdlib>
#include <cstring>

namespace longtrace {

const SoftmaxKernels& softmax_kernels() {
#if defined(__x86_64__)
  static const SoftmaxKernels& best = []() -> const SoftmaxKernels& {
    const char* asked = std::getenv("LONGTRACE_CPU_CAPABILITY");
    const bool no_avx512 = asked && (!std::strcmp(asked, "avx2") || !std::strcmp(asked, "baseline"));
    const bool no_avx2 = asked && !std::strcmp(asked, "baseline");
    __builtin_cpu_init();
    if (!no_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return softmax_avx512;
    if (!no_avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return softmax_avx2;
    return softmax_baseline;
  }();
  return best;
#else
  return softmax_baseline;
#endif
}

}  // namespace longtrace
