// Best-fit decreasing: `longtrace.kernels._pack`, bin for bin what kernels/packing/reference.py computes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace {

// A set of integers in [0, size) with "smallest member >= x" in a few word operations: 64-ary bitmaps, one per level.
class RoomSet {
 public:
  explicit RoomSet(int64_t size) {
    do {
      size = (size + 63) / 64;
      levels_.emplace_back(size, 0);
    } while (size > 1);
  }
  void insert(int64_t x) {
    for (auto& level : levels_) {
      level[x / 64] |= uint64_t{1} << (x % 64);
      x /= 64;
    }
  }
  void erase(int64_t x) {
    for (auto& level : levels_) {
      if (level[x / 64] &= ~(uint64_t{1} << (x % 64))) return;
      x /= 64;
    }
  }
  int64_t at_least(int64_t x) const {
    for (size_t depth = 0; depth < levels_.size(); ++depth) {
      if (x / 64 >= int64_t(levels_[depth].size())) return -1;
      if (const uint64_t rest = levels_[depth][x / 64] >> (x % 64)) {
        x += __builtin_ctzll(rest);
        while (depth-- > 0) x = x * 64 + __builtin_ctzll(levels_[depth][x]);
        return x;
      }
      x = x / 64 + 1;
    }
    return -1;
  }

 private:
  std::vector<std::vector<uint64_t>> levels_;
};

std::vector<std::vector<int64_t>> best_fit_decreasing(const std::vector<int64_t>& lengths, int64_t capacity) {
  std::vector<int64_t> order(lengths.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return lengths[i] > lengths[j]; });
  std::vector<std::vector<int64_t>> bins;
  std::vector<int64_t> newest(capacity + 1, -1);  // room -> the bin that reached it last
  std::vector<int64_t> below;                     // bin -> the bin under it on that room's stack
  RoomSet rooms(capacity + 1);
  for (const int64_t row : order) {
    int64_t room = rooms.at_least(lengths[row]), bin;
    if (room < 0) {
      room = capacity;
      bin = int64_t(bins.size());
      bins.emplace_back();
      below.push_back(-1);
    } else {
      bin = newest[room];
      newest[room] = below[bin];
      if (newest[room] < 0) rooms.erase(room);
    }
    bins[bin].push_back(row);
    room -= lengths[row];
    if (room > 0) {
      below[bin] = newest[room];
      newest[room] = bin;
      rooms.insert(room);
    }
  }
  return bins;
}

}  // namespace

PYBIND11_MODULE(_pack, m) {
  m.def("best_fit_decreasing", &best_fit_decreasing, pybind11::arg("lengths"), pybind11::arg("capacity"));
}
