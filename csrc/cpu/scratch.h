// Aligned scratch memory.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace longtrace {

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

struct Free {
  void operator()(char* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, Free>;

// 64-byte aligned, uninitialised.
inline Buffer scratch(int64_t bytes) {
  void* p = std::aligned_alloc(64, size_t(round_up(std::max<int64_t>(bytes, 64), 64)));
  if (!p) throw std::bad_alloc();
  return Buffer(static_cast<char*>(p));
}

inline float* as_floats(const Buffer& buffer) { return reinterpret_cast<float*>(buffer.get()); }

}  // namespace longtrace
