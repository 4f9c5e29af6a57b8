// Group-relative advantages: a warp takes a group, reads its rewards once for count, mean, variance and range, and writes from
// cache. Replaces a dozen torch ops over padded groups. Welford in each lane and Chan's formula across them, of distances from
// the group's first reward: no cancellation, always in the same order.
#include <math.h>

#include "launch.h"
#include "longtrace_cuda.h"

namespace longtrace {
namespace {

constexpr int kGroups = 4;     // of a block
constexpr float kEps = 1e-4f;  // kernels/advantages/reference.py

enum Kind { all_right, all_wrong, mixed, unscored };  // the order of `counts`

struct Moments {
  int64_t n;
  float mean, squares, top, bottom;  // squares: the sum of (x - mean)^2
};

__device__ Moments combine(const Moments& a, const Moments& b) {
  if (a.n == 0) return b;
  if (b.n == 0) return a;
  const int64_t n = a.n + b.n;
  const float delta = b.mean - a.mean, share = float(b.n) / float(n);
  return {
      n, a.mean + delta * share, a.squares + b.squares + delta * delta * float(a.n) * share, fmaxf(a.top, b.top),
      fminf(a.bottom, b.bottom)};
}

// The first finite reward of the group, in every lane; 0 if there is none.
__device__ float first_scored(const float* rewards, int64_t size, int lane) {
  for (int64_t i = lane; i - lane < size; i += kWarp) {
    const float r = i < size ? rewards[i] : NAN;
    const unsigned found = __ballot_sync(kAllLanes, isfinite(r));
    if (found) return __shfl_sync(kAllLanes, r, __ffs(int(found)) - 1);
  }
  return 0.0f;
}

__global__ void group_advantages_kernel(
    const float* rewards, const int64_t* offsets, int64_t groups, bool by_std, bool leave_one_out, bool sample, float* values,
    bool* degenerate, unsigned long long* counts) {
  __shared__ unsigned block_counts[4];
  if (threadIdx.x < 4) block_counts[threadIdx.x] = 0;
  __syncthreads();

  const int lane = threadIdx.x % kWarp;
  const int64_t group = int64_t(blockIdx.x) * kGroups + threadIdx.x / kWarp;
  if (group < groups) {  // the same for all lanes of a warp
    const int64_t begin = offsets[group], size = offsets[group + 1] - begin;
    const float origin = first_scored(rewards + begin, size, lane);
    Moments m = {0, 0.0f, 0.0f, -INFINITY, INFINITY};
    for (int64_t i = lane; i < size; i += kWarp) {
      const float r = rewards[begin + i], x = r - origin;
      if (!isfinite(r)) continue;
      const float delta = x - m.mean;
      m.n += 1;
      m.mean += delta / float(m.n);
      m.squares += delta * (x - m.mean);
      m.top = fmaxf(m.top, r);
      m.bottom = fminf(m.bottom, r);
    }
    for (int step = kWarp / 2; step; step /= 2) {
      const Moments other = {
          int64_t(__shfl_down_sync(kAllLanes, (long long)m.n, step)), __shfl_down_sync(kAllLanes, m.mean, step),
          __shfl_down_sync(kAllLanes, m.squares, step), __shfl_down_sync(kAllLanes, m.top, step),
          __shfl_down_sync(kAllLanes, m.bottom, step)};
      m = combine(m, other);
    }

    Kind kind = m.n == 0 ? unscored : m.top > m.bottom ? mixed : m.top > 0.0f ? all_right : all_wrong;
    const float n = float(m.n);
    float factor = 0.0f;
    if (kind == mixed) {
      factor = leave_one_out ? n / (n - 1.0f) : 1.0f;  // r - mean of the others = n / (n - 1) (r - mean)
      if (by_std) factor /= sqrtf(m.squares / (sample ? n - 1.0f : n)) + kEps;
    }
    if (lane == 0) {
      degenerate[group] = kind != mixed;
      atomicAdd(&block_counts[kind], 1u);  // of integers: any order gives the same sum
    }
    factor = __shfl_sync(kAllLanes, factor, 0);
    const float mean = __shfl_sync(kAllLanes, m.mean, 0);
    for (int64_t i = lane; i < size; i += kWarp) {
      const float r = rewards[begin + i];
      values[begin + i] = factor != 0.0f && isfinite(r) ? (r - origin - mean) * factor : 0.0f;
    }
  }

  __syncthreads();
  if (threadIdx.x < 4) atomicAdd(&counts[threadIdx.x], (unsigned long long)block_counts[threadIdx.x]);
}

}  // namespace
}  // namespace longtrace

int longtrace_group_advantages(
    const float* rewards, const int64_t* offsets, int64_t groups, int by_std, int leave_one_out, int sample, float* values,
    bool* degenerate, unsigned long long* counts, void* stream) {
  using namespace longtrace;
  return launch(
      group_advantages_kernel, ceil_div(groups, kGroups), kGroups * kWarp, stream, rewards, offsets, groups, by_std != 0,
      leave_one_out != 0, sample != 0, values, degenerate, counts);
}
