// Attention over packed documents on the CPU, flash-style over the tile kernels: scores never leave the cache.
//
// The rows of a kv head's query heads are folded, row r = (query r / group, head r % group), 32 to a panel. Keys go down
// the rows of a tile and queries across its lanes: maxima and sums never cross lanes, and the probabilities come out as
// the panel that the product with the values wants.
#pragma once
#include "tile.h"

#include <functional>

namespace longtrace::attention {

using ForEach = std::function<void(int64_t, const std::function<void(int64_t, int64_t)>&)>;

// q (T, heads, D), k (Tk, kv_heads, D), v (Tk, kv_heads, Dv): dense, in the operand dtype, D and Dv multiples of 32.
// Document i holds queries [starts_q[i], starts_q[i + 1]) and keys [starts_k[i], starts_k[i + 1]).
struct Problem {
  const void *q, *k, *v;
  int64_t heads, kv_heads, D, Dv, documents;
  const int64_t *starts_q, *starts_k;
  float scale, softcap;  // softcap 0: none
  bool causal;           // the last query is aligned with the last key
  int64_t left, right;   // window, inclusive; -1: open
  const float* sinks;    // (heads,) or null
};

// out (T, heads, Dv) in the operand dtype; the log-sum of a softmax in powers of two is reference + log_sum, (T, heads)
// each, +inf for a query that sees no key and no sink.
void forward(const TileKernels& k, const Problem& problem, void* out, float* reference, float* log_sum, const ForEach& for_each);

// Gradients of q, k, v as they lie, in the operand dtype; delta (T, heads) = sum of grad_out * out.
// for_each must hand out items one at a time and in order: later ones wait for earlier ones.
void backward(
    const TileKernels& k, const Problem& problem, const void* out, const void* grad_out, const float* reference,
    const float* log_sum, float* delta, void* dq, void* dk, void* dv, const ForEach& for_each);

}  // namespace longtrace::attention
