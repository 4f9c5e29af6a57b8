// Two lists of gradients into one, with their norms and dot product: one read of both, one write. Replaces torch._foreach_mul_,
// _foreach_add_, two norms and a dot: five passes. A block takes a chunk of one tensor found in a table of pointers; a second
// kernel adds the chunks' sums in order, without atomics: the same bits on every run.
#include <math.h>

#include "launch.h"
#include "longtrace_cuda.h"

namespace longtrace {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kVector = 8;  // elements of a thread at a time: 16 bytes of bf16, two times 16 of fp32
constexpr int64_t kChunk = 16 * kThreads * kVector;

using Bf16 = uint16_t;

__device__ float widen(float x) { return x; }
__device__ float widen(Bf16 x) { return __uint_as_float(unsigned(x) << 16); }
__device__ void narrow(float x, float& out) { out = x; }
__device__ void narrow(float x, Bf16& out) {  // to nearest, ties to even; NaN stays NaN
  const unsigned bits = __float_as_uint(x);
  out = Bf16((isnan(x) ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Eight elements from p on; those at `left` and after are not touched and read 0.
template <class T>
__device__ void load(const T* p, int64_t left, bool aligned, float (&x)[kVector]) {
  alignas(uint4) T line[kVector] = {};
  if (aligned && left >= kVector) {
    for (int i = 0; i < kVector * int(sizeof(T)) / int(sizeof(uint4)); ++i)
      reinterpret_cast<uint4*>(line)[i] = reinterpret_cast<const uint4*>(p)[i];
  } else {
    for (int i = 0; i < kVector; ++i)
      if (i < left) line[i] = p[i];
  }
  for (int i = 0; i < kVector; ++i) x[i] = widen(line[i]);
}

template <class T>
__device__ void store(T* p, int64_t left, bool aligned, const float (&x)[kVector]) {
  alignas(uint4) T line[kVector];
  for (int i = 0; i < kVector; ++i) narrow(x[i], line[i]);
  if (aligned && left >= kVector) {
    for (int i = 0; i < kVector * int(sizeof(T)) / int(sizeof(uint4)); ++i)
      reinterpret_cast<uint4*>(p)[i] = reinterpret_cast<const uint4*>(line)[i];
  } else {
    for (int i = 0; i < kVector; ++i)
      if (i < left) p[i] = line[i];
  }
}

struct Sums {
  double trace_sq, empty_sq, dot, bad;
};

__device__ Sums operator+(const Sums& a, const Sums& b) {
  return {a.trace_sq + b.trace_sq, a.empty_sq + b.empty_sq, a.dot + b.dot, a.bad + b.bad};
}

// The sums of a block, in its first thread: over lanes, then over warps, always in the same order.
__device__ Sums block_sum(Sums sums) {
  __shared__ Sums of_warp[kWarps];
  for (int step = kWarp / 2; step; step /= 2)
    sums = sums + Sums{
                      __shfl_down_sync(kAllLanes, sums.trace_sq, step), __shfl_down_sync(kAllLanes, sums.empty_sq, step),
                      __shfl_down_sync(kAllLanes, sums.dot, step), __shfl_down_sync(kAllLanes, sums.bad, step)};
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sums;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kWarps; ++warp) sums = sums + of_warp[warp];
  return sums;
}

// Elements [begin, end) of one pair; each thread's sums are fp32, of at most kChunk / kThreads elements.
template <class T, class E>
__device__ Sums blend_chunk(T* __restrict__ trace, const E* __restrict__ empty, int64_t begin, int64_t end, float alpha, float beta) {
  const bool aligned = (reinterpret_cast<uintptr_t>(trace) | reinterpret_cast<uintptr_t>(empty)) % sizeof(uint4) == 0;
  const bool trace_last = fabsf(alpha) >= fabsf(beta);  // of two products the smaller is rounded before the sum
  float tt = 0.0f, ee = 0.0f, te = 0.0f, bad = 0.0f;
  for (int64_t i = begin + threadIdx.x * kVector; i < end; i += kThreads * kVector) {
    float t[kVector], e[kVector];
    load(trace + i, end - i, aligned, t);
    load(empty + i, end - i, aligned, e);
    for (int k = 0; k < kVector; ++k) {
      tt += t[k] * t[k];
      ee += e[k] * e[k];
      te += t[k] * e[k];
      bad += isfinite(t[k]) && isfinite(e[k]) ? 0.0f : 1.0f;
      t[k] = trace_last ? fmaf(alpha, t[k], beta * e[k]) : fmaf(beta, e[k], alpha * t[k]);
    }
    store(trace + i, end - i, aligned, t);
  }
  return {tt, ee, te, bad};
}

__global__ void __launch_bounds__(kThreads)
    blend_kernel(const LongtracePair* pairs, int64_t count, float alpha, float beta, Sums* partial) {
  const int64_t chunk = blockIdx.x;
  int64_t low = 0, high = count;  // the last pair whose first chunk is at most `chunk`; empty tensors have no chunk
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (pairs[middle].first_chunk <= chunk ? low : high) = middle;
  }
  const LongtracePair p = pairs[low];
  const int64_t begin = (chunk - p.first_chunk) * kChunk;
  const int64_t end = begin + kChunk < p.n ? begin + kChunk : p.n;
  float* trace = static_cast<float*>(p.trace);
  const float* empty = static_cast<const float*>(p.empty);
  Bf16* trace16 = static_cast<Bf16*>(p.trace);
  const Bf16* empty16 = static_cast<const Bf16*>(p.empty);
  Sums sums;
  if (p.trace_bf16)
    sums = p.empty_bf16 ? blend_chunk(trace16, empty16, begin, end, alpha, beta) : blend_chunk(trace16, empty, begin, end, alpha, beta);
  else
    sums = p.empty_bf16 ? blend_chunk(trace, empty16, begin, end, alpha, beta) : blend_chunk(trace, empty, begin, end, alpha, beta);
  sums = block_sum(sums);
  if (threadIdx.x == 0) partial[chunk] = sums;
}

__global__ void __launch_bounds__(kThreads) sum_kernel(const Sums* partial, int64_t chunks, Sums* out) {
  Sums sums = {};
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) sums = sums + partial[i];
  sums = block_sum(sums);
  if (threadIdx.x == 0) *out = sums;
}

}  // namespace
}  // namespace longtrace

int64_t longtrace_blend_chunk() { return longtrace::kChunk; }

int longtrace_blend_gradients(
    const LongtracePair* pairs, int64_t count, int64_t chunks, float alpha, float beta, double* partial, double* sums,
    void* stream) {
  using namespace longtrace;
  Sums* parts = reinterpret_cast<Sums*>(partial);
  const int error = launch(blend_kernel, chunks, kThreads, stream, pairs, count, alpha, beta, parts);
  return error ? error : launch(sum_kernel, 1, kThreads, stream, parts, chunks, reinterpret_cast<Sums*>(sums));
}
