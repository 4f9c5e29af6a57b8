// The torch op of group advantages: statistics of each group in fp64, in the order of its rewards.
#include <cmath>
#include <tuple>
#include <vector>

#include "ops.h"

namespace longtrace {
namespace {

constexpr double kEps = 1e-4;  // kernels/advantages/reference.py

enum Kind : uint8_t { all_right, all_wrong, mixed, unscored };  // the order of `counts`

struct How {
  bool by_std, leave_one_out, sample;
};

template <class T>
Kind one_group(const T* r, int64_t size, How how, T* out) {
  double sum = 0, top = -INFINITY, bottom = INFINITY;
  int64_t n = 0;
  for (int64_t i = 0; i < size; ++i) {
    out[i] = T(0);
    if (!std::isfinite(r[i])) continue;
    sum += r[i], ++n;
    top = std::max(top, double(r[i])), bottom = std::min(bottom, double(r[i]));
  }
  if (n == 0) return unscored;
  if (top == bottom) return top > 0 ? all_right : all_wrong;
  const double mean = sum / double(n);
  double squares = 0;
  for (int64_t i = 0; i < size; ++i)
    if (std::isfinite(r[i])) squares += (r[i] - mean) * (r[i] - mean);
  double factor = how.leave_one_out ? double(n) / double(n - 1) : 1.0;  // r - mean of the others = n / (n - 1) (r - mean)
  if (how.by_std) factor /= std::sqrt(squares / double(how.sample ? n - 1 : n)) + kEps;
  for (int64_t i = 0; i < size; ++i)
    if (std::isfinite(r[i])) out[i] = T((r[i] - mean) * factor);
  return mixed;
}

template <class T>
void all_groups(const Tensor& rewards, const int64_t* offsets, How how, Tensor& values, std::vector<Kind>& kinds) {
  const T* from = rewards.const_data_ptr<T>();
  T* to = values.mutable_data_ptr<T>();
  for_each(int64_t(kinds.size()), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g)
      kinds[g] = one_group(from + offsets[g], offsets[g + 1] - offsets[g], how, to + offsets[g]);
  });
}

// (values like rewards, degenerate (G,) bool, counts (4,) int64); rewards (N,) fp32 or fp64, offsets (G + 1,) int64.
std::tuple<Tensor, Tensor, Tensor> group_advantages(
    const Tensor& rewards, const Tensor& offsets, bool by_std, bool leave_one_out, bool sample) {
  const bool wide = rewards.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(
      rewards.dim() == 1 && rewards.is_contiguous() && (wide || rewards.scalar_type() == ScalarType::Float),
      "rewards must be a contiguous vector, fp32 or fp64");
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) > 0, "offsets must be a vector of at least one entry");
  const int64_t groups = offsets.size(0) - 1, N = rewards.size(0);
  const int64_t* at = indices(offsets, groups + 1, N + 1, "offsets");
  for (int64_t g = 0; g < groups; ++g) STD_TORCH_CHECK(at[g] <= at[g + 1], "offsets must not decrease");
  STD_TORCH_CHECK(at[0] == 0 && at[groups] == N, "offsets must run from 0 to the number of rewards");
  Tensor values = torch::stable::new_empty(rewards, {N}, rewards.scalar_type());
  std::vector<Kind> kinds(groups);
  const How how{by_std, leave_one_out, sample};
  if (wide) all_groups<double>(rewards, at, how, values, kinds);
  else all_groups<float>(rewards, at, how, values, kinds);
  Tensor degenerate = torch::stable::new_empty(rewards, {groups}, ScalarType::Bool);
  Tensor counts = torch::stable::new_zeros(rewards, {4}, ScalarType::Long);
  bool* flat = static_cast<bool*>(degenerate.mutable_data_ptr());
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  for (int64_t g = 0; g < groups; ++g) {
    flat[g] = kinds[g] != mixed;
    ++count[kinds[g]];
  }
  return {values, degenerate, counts};
}

}  // namespace
}  // namespace longtrace

STABLE_TORCH_LIBRARY_FRAGMENT(longtrace, m) {
  m.def(
      "group_advantages(Tensor rewards, Tensor offsets, bool by_std, bool leave_one_out, bool sample) -> "
      "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(longtrace, CPU, m) { m.impl("group_advantages", TORCH_BOX(&longtrace::group_advantages)); }
