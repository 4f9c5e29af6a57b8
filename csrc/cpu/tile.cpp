// Which tile kernels this processor runs.
#include "tile.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace longtrace {
namespace {

#if defined(__x86_64__)
enum Level { baseline, avx2, avx512, avx512_bf16, amx };

// Linux lends the tile registers to a process that asks (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
bool tiles_granted() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

Level widest() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return baseline;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl"))
    return avx2;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & (1u << 5))) return avx512;
  const bool has_tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & (1u << 22)) && (d & (1u << 24));
  return has_tiles && tiles_granted() ? amx : avx512_bf16;
}

Level level() {
  static const Level found = [] {
    const Level best = widest();
    const char* asked = std::getenv("LONGTRACE_CPU_CAPABILITY");
    if (!asked) return best;
    const char* names[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};
    for (int i = 0; i < best; ++i)
      if (!std::strcmp(asked, names[i])) return Level(i);
    return best;
  }();
  return found;
}
#endif

}  // namespace

const TileKernels& tile_kernels(Dtype dtype) {
#if defined(__x86_64__)
  const Level at = level();
  if (dtype == Dtype::bf16 && at == amx) return tile_amx;
  if (dtype == Dtype::bf16 && at == avx512_bf16) return tile_avx512_bf16;
  return at >= avx512 ? tile_avx512 : at == avx2 ? tile_avx2 : tile_baseline;
#else
  return tile_baseline;
#endif
}

}  // namespace longtrace
