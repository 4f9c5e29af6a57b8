// Aligned scratch memory.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace longtrace {

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

struct Free {
  void operator()(char* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, Free>;

// Huge pages spare a page fault every 4 KB of fresh memory.
inline void ask_huge_pages([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p), first = (begin + page - 1) / page * page;
  const uintptr_t end = (begin + bytes) / page * page;
  if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// 64-byte aligned, uninitialised.
inline Buffer scratch(int64_t bytes) {
  void* p = std::aligned_alloc(64, size_t(round_up(std::max<int64_t>(bytes, 64), 64)));
  if (!p) throw std::bad_alloc();
  ask_huge_pages(p, size_t(bytes));
  return Buffer(static_cast<char*>(p));
}

inline float* as_floats(const Buffer& buffer) { return reinterpret_cast<float*>(buffer.get()); }

}  // namespace longtrace
