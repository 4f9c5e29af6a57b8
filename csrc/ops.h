// What the torch ops of longtrace share: LibTorch's stable ABI (one binary serves torch 2.11 and later, any Python), checks,
// and work for all threads.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <optional>

#include "cpu/scratch.h"
#include "cpu/tile.h"

namespace longtrace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::fp32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::fp16;
    default: STD_TORCH_CHECK(false, name, " must be fp32, bf16 or fp16");
  }
}

inline Matrix matrix(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2 && (x.stride(1) == 1 || x.size(1) <= 1), name, " must be a matrix of dense rows");
  return {x.const_data_ptr(), dtype_of(x, name), x.stride(0)};
}

inline const float* vector(const Tensor& x, int64_t size, const char* name) {
  STD_TORCH_CHECK(
      x.dim() == 1 && x.size(0) == size && x.scalar_type() == ScalarType::Float && x.is_contiguous(), name,
      " must be a contiguous fp32 vector of ", size);
  return x.const_data_ptr<float>();
}

inline const float* vector(const std::optional<Tensor>& x, int64_t size, const char* name) {
  return x ? vector(*x, size, name) : nullptr;
}

inline const int64_t* indices(const Tensor& x, int64_t size, int64_t limit, const char* name) {
  STD_TORCH_CHECK(
      x.dim() == 1 && x.size(0) == size && x.scalar_type() == ScalarType::Long && x.is_contiguous(), name,
      " must be a contiguous int64 vector of ", size);
  const int64_t* at = x.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < size; ++i)
    STD_TORCH_CHECK(at[i] >= 0 && at[i] < limit, name, " ", at[i], " is not in [0, ", limit, ")");
  return at;
}

inline void ask_huge_pages(const Tensor& x) { ask_huge_pages(x.mutable_data_ptr(), size_t(x.numel()) * x.element_size()); }

// Pieces are handed out in order as threads come free: cores that share their time with others do less, results do not change.
inline void for_pieces(int64_t count, int64_t piece, const std::function<void(int64_t, int64_t)>& f) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(piece); i < count; i = next.fetch_add(piece)) f(i, std::min(i + piece, count));
  });
}

inline void for_each(int64_t count, const std::function<void(int64_t, int64_t)>& f) {
  for_pieces(count, std::max<int64_t>(1, count / (16 * std::max<int64_t>(torch::stable::get_num_threads(), 1))), f);
}

}  // namespace longtrace
