// The vocabulary head on the CPU, over the tile kernels: logits never reach memory whole, only probabilities of a chunk do.
#pragma once
#include "tile.h"

#include <functional>

namespace longtrace::head {

// for_each(count, f): f(begin, end) over disjoint pieces of [0, count), in parallel.
using ForEach = std::function<void(int64_t, const std::function<void(int64_t, int64_t)>&)>;

// z = softcap(logit_scale * (h . w) + bias) / temperature
struct Transform {
  float logit_scale, softcap, temperature;  // softcap 0: none
  const float* bias;                        // (V,) or null
};

// Per token, (n,) each. lse = maximum + log_sum; the probabilities are scale * g for g as kept by the forward, mass their
// sum as rounded.
struct TokenStats {
  float *maximum, *log_sum, *log_prob, *entropy, *mass, *slope, *scale;  // entropy, mass null: not asked for
};

// Coefficients of the recomputed gradient, (n,) each: p (a - e (log p + entropy)).
struct TokenCoefficients {
  const float *maximum, *log_sum, *a, *e, *entropy;
};

int64_t padded_tokens(int64_t n);  // n in whole panels: columns of g that are read and written
int64_t row_stride(int64_t n);     // of g: an odd number of panels, so that its rows spread over the cache's sets

// Statistics of h (n, H) against weight (V, H) at target; g (V, row_stride(n)) in the operand dtype, or null.
void forward(
    const TileKernels& k, const Matrix& h, int64_t n, int64_t H, const Matrix& weight, int64_t V, const Transform& transform,
    const int64_t* target, const TokenStats& out, void* g, const ForEach& for_each);

// g = d/dz of known coefficients, times the softcap's derivative; target entries 0.
void gradient(
    const TileKernels& k, const Matrix& h, int64_t n, int64_t H, const Matrix& weight, int64_t V, const Transform& transform,
    const int64_t* target, const TokenCoefficients& with, void* g, const ForEach& for_each);

// out (n, N) = scale * g^T (F rows, row stride ldg) @ right (F, N)
void dh(
    const TileKernels& k, const void* g, int64_t ldg, int64_t F, int64_t n, const Matrix& right, int64_t N, const float* scale,
    float* out, const ForEach& for_each);

// The same for N <= 32 columns, of every `step`th panel of 32 tokens only; the other rows of out are left alone.
void narrow_dh(
    const TileKernels& k, const void* g, int64_t ldg, int64_t F, int64_t n, const Matrix& right, int64_t N, const float* scale,
    float* out, int64_t step, const ForEach& for_each);

// out (its rows `rows` if given, row stride ldo) = or += g (F, n) @ diag(scale) right (n, N)
void dw(
    const TileKernels& k, const void* g, int64_t ldg, int64_t F, int64_t n, const Matrix& right, int64_t N, const float* scale,
    float* out, int64_t ldo, const int64_t* rows, bool add, const ForEach& for_each);

// out (F,) = max_i scale[i] g[v, i]
void column_max(
    const TileKernels& k, const void* g, int64_t ldg, int64_t F, int64_t n, const float* scale, float* out, const ForEach& for_each);

}  // namespace longtrace::head
