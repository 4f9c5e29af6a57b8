// CUDA's execution model on the host, in place of NVIDIA's header: the .cu sources compile with g++ and run under ASan and UBSan.
//
// Every thread of a block is a fibre; blocks run one after another, in random order. A fibre runs until it meets others (a
// barrier, a shuffle, a vote) and a seeded scheduler picks who goes next, so what a missing barrier leaves to chance goes wrong
// under some seed. Shared memory holds NaNs when a block starts. Barriers and warp operations that do not meet are errors.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <strings.h>
#include <ucontext.h>

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <queue>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("cuda_shared")))

extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __start_cuda_shared[], __stop_cuda_shared[];

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_host {

constexpr size_t kStack = 32 << 10;
constexpr unsigned kWarp = 32;

enum class Wait { nothing, barrier, warp };

struct Fibre {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  void* fake_stack = nullptr;  // ASan's
  bool done = false;
  Wait wait = Wait::nothing;
  const char* what = "";  // which operation waits, and its line
  int line = 0;
  unsigned mask = 0, source = 0;  // of a warp operation: who takes part, and the lane whose value is wanted
  uint64_t value = 0, result = 0;
  unsigned votes = 0;
};

inline uint64_t seed = 0;
inline int64_t first_block = 0, last_block = INT64_MAX;  // blocks outside are not run (grids of one block are run whole)
inline std::string error;

struct Random {
  uint64_t state;
  uint64_t operator()(uint64_t limit) {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return (z ^ (z >> 31)) % limit;
  }
};

class Block {
 public:
  virtual ~Block() = default;
  virtual void body() = 0;

  // Runs all threads to their end; false with `error` set if they cannot.
  bool run(unsigned threads, Random& random) {
    if (fibres_.size() != threads) fibres_ = std::vector<Fibre>(threads);
    failed_ = false;
    random_ = &random;
    current_block = this;
    for (unsigned char* p = __start_cuda_shared; p && p < __stop_cuda_shared; ++p) *p = 0xff;
    start();
    for (unsigned alive = threads; alive;) {
      if (ready_.empty() && !release_barrier()) return false;
      const unsigned next = ready_.top().second;
      ready_.pop();
      resume(next);
      if (failed_) return false;
      alive -= fibres_[next].done;
    }
    return true;
  }

  Fibre& self() { return fibres_[at_]; }
  unsigned lane() const { return at_ % kWarp; }

  // The running thread waits for the others and goes on when all are there.
  void meet(Wait wait, const char* what, int line) {
    Fibre& f = self();
    f.wait = wait, f.what = what, f.line = line;
    if (wait == Wait::warp) complete_warp();
    if (f.wait != Wait::nothing) leave(false);
  }

  [[noreturn]] void fail(const std::string& why) {
    error = "block " + std::to_string(blockIdx.x) + " thread " + std::to_string(at_) + ": " + why;
    failed_ = true;
    leave(false);
    __builtin_unreachable();
  }

  static inline Block* current_block = nullptr;

 private:
  static __attribute__((no_sanitize("address"))) void entry() {
    Block* block = current_block;
    __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_bottom_, &block->scheduler_size_);
    block->body();
    block->self().done = true;
    block->leave(true);
  }

  void start() {
    const unsigned threads = unsigned(fibres_.size());
    ready_ = {};
    // One of three orders: any thread at any time; one warp as far as it gets, then another; the same by threads.
    order_ = (*random_)(3);
    rank_.resize(threads);
    for (uint64_t& rank : rank_) rank = (*random_)(1u << 30);
    if (order_ == 1)
      for (unsigned i = threads; i-- > 0;) rank_[i] |= rank_[i / kWarp * kWarp] << 30;
    for (unsigned i = 0; i < threads; ++i) {
      Fibre& f = fibres_[i];
      __asan_unpoison_memory_region(f.stack.data(), kStack);
      f.done = false, f.fake_stack = nullptr;
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.data();
      f.context.uc_stack.ss_size = kStack;
      f.context.uc_link = nullptr;
      makecontext(&f.context, entry, 0);
      release(i);
    }
  }

  // Thread i may go on.
  void release(unsigned i) {
    fibres_[i].wait = Wait::nothing;
    ready_.push({order_ == 0 ? (*random_)(1u << 30) : rank_[i], i});
  }

  __attribute__((no_sanitize("address"))) void resume(unsigned i) {
    at_ = i;
    threadIdx = dim3(i, 0, 0);
    Fibre& f = fibres_[i];
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, f.stack.data(), kStack);
    swapcontext(&scheduler_, &f.context);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
  }

  __attribute__((no_sanitize("address"))) void leave(bool for_ever) {
    Fibre& f = self();
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &f.fake_stack, scheduler_bottom_, scheduler_size_);
    swapcontext(&f.context, &scheduler_);
    __sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);
  }

  // Nobody can go on: a barrier that all have reached, or an error.
  bool release_barrier() {
    const Fibre* first = nullptr;
    for (const Fibre& f : fibres_)
      if (!f.done && !first) first = &f;
    for (const Fibre& f : fibres_)
      if (f.done || f.wait != Wait::barrier || f.line != first->line) return deadlock();
    for (unsigned i = 0; i < fibres_.size(); ++i) release(i);
    return true;
  }

  bool deadlock() {
    error = "block " + std::to_string(blockIdx.x) + " cannot go on:";
    unsigned done = 0;
    std::vector<std::string> seen;
    for (const Fibre& f : fibres_) {
      done += f.done;
      const std::string text = std::string(" ") + f.what + " of line " + std::to_string(f.line);
      if (!f.done && std::find(seen.begin(), seen.end(), text) == seen.end()) seen.push_back(text), error += text + ";";
    }
    error += " " + std::to_string(done) + " of " + std::to_string(fibres_.size()) + " threads have left";
    return false;
  }

  // The running lane has arrived; when all lanes of its mask have, each gets its result.
  void complete_warp() {
    const Fibre& f = self();
    const unsigned base = at_ / kWarp * kWarp;
    if (!(f.mask >> lane() & 1)) fail(std::string(f.what) + ": the mask leaves this lane out");
    unsigned votes = 0;
    for (unsigned i = 0; i < kWarp; ++i) {
      if (!(f.mask >> i & 1)) continue;
      if (base + i >= fibres_.size()) fail(std::string(f.what) + ": the mask names a lane that is not there");
      const Fibre& other = fibres_[base + i];
      if (other.done || other.wait != Wait::warp || other.line != f.line || strcmp(other.what, f.what)) return;
      if (other.mask != f.mask) fail(std::string(f.what) + ": the lanes' masks differ");
      votes |= unsigned(other.value != 0) << i;
    }
    for (unsigned i = 0; i < kWarp; ++i) {
      if (!(f.mask >> i & 1)) continue;
      Fibre& other = fibres_[base + i];
      if (!(f.mask >> other.source & 1)) fail(std::string(f.what) + ": reads a lane outside the mask");
      other.result = fibres_[base + other.source].value;
      other.votes = votes;
    }
    for (unsigned i = 0; i < kWarp; ++i)
      if (f.mask >> i & 1 && base + i != at_) release(base + i);
    self().wait = Wait::nothing;  // the running lane goes on
  }

  std::vector<Fibre> fibres_;
  std::vector<uint64_t> rank_;
  std::priority_queue<std::pair<uint64_t, unsigned>> ready_;
  Random* random_ = nullptr;
  ucontext_t scheduler_ = {};
  const void* scheduler_bottom_ = nullptr;
  size_t scheduler_size_ = 0;
  uint64_t order_ = 0;
  unsigned at_ = 0;
  bool failed_ = false;
};

template <class Body>
class BlockOf : public Block {
 public:
  explicit BlockOf(const Body& body) : body_(body) {}
  void body() override { body_(); }

 private:
  const Body& body_;
};

template <class Body>
cudaError_t run_grid(dim3 grid, dim3 block, const Body& body) {
  if (!grid.x || !block.x || block.x > 1024 || block.y * block.z * grid.y * grid.z != 1) return cudaErrorInvalidConfiguration;
  gridDim = grid, blockDim = block;
  error.clear();
  Random random{seed};
  const bool whole = grid.x == 1;
  const int64_t first = whole ? 0 : first_block, last = whole ? 1 : std::min<int64_t>(grid.x, last_block);
  std::vector<int64_t> order;
  for (int64_t i = first; i < last; ++i) order.push_back(i);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random(i)]);
  BlockOf<Body> one(body);
  for (const int64_t i : order) {
    blockIdx = dim3(unsigned(i), 0, 0);
    if (!one.run(block.x, random)) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

inline unsigned vote(unsigned mask, bool yes, const char* what, int line) {
  Block& block = *Block::current_block;
  Fibre& f = block.self();
  f.mask = mask, f.value = yes, f.source = block.lane();
  block.meet(Wait::warp, what, line);
  return f.votes;
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source, const char* what, int line) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "what CUDA shuffles");
  Block& block = *Block::current_block;
  Fibre& f = block.self();
  f.mask = mask, f.source = source, f.value = 0;
  memcpy(&f.value, &value, sizeof(T));
  block.meet(Wait::warp, what, line);
  memcpy(&value, &f.result, sizeof(T));
  return value;
}

}  // namespace cuda_host

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  return cuda_host::run_grid(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
}

inline void __syncthreads(int line = __builtin_LINE()) {
  cuda_host::Block::current_block->meet(cuda_host::Wait::barrier, "__syncthreads", line);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int line = __builtin_LINE()) {
  return cuda_host::shuffle(mask, value, unsigned(lane) % cuda_host::kWarp, "__shfl_sync", line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int line = __builtin_LINE()) {
  const unsigned lane = cuda_host::Block::current_block->lane(), from = lane + delta;
  return cuda_host::shuffle(mask, value, from < cuda_host::kWarp ? from : lane, "__shfl_down_sync", line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned with, int line = __builtin_LINE()) {
  const unsigned lane = cuda_host::Block::current_block->lane();
  return cuda_host::shuffle(mask, value, (lane ^ with) % cuda_host::kWarp, "__shfl_xor_sync", line);
}
inline unsigned __ballot_sync(unsigned mask, bool yes, int line = __builtin_LINE()) {
  return cuda_host::vote(mask, yes, "__ballot_sync", line);
}
inline bool __any_sync(unsigned mask, bool yes, int line = __builtin_LINE()) {
  return cuda_host::vote(mask, yes, "__any_sync", line) != 0;
}
inline bool __all_sync(unsigned mask, bool yes, int line = __builtin_LINE()) {
  return cuda_host::vote(mask, yes, "__all_sync", line) == mask;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  cuda_host::vote(mask, true, "__syncwarp", line);
}
template <class T, class U>
T atomicAdd(T* p, U x) {
  const T before = *p;
  *p = T(before + T(x));
  return before;
}
inline int __ffs(int x) { return ffs(x); }
inline float __uint_as_float(unsigned x) {
  float y;
  memcpy(&y, &x, sizeof y);
  return y;
}
inline unsigned __float_as_uint(float x) {
  unsigned y;
  memcpy(&y, &x, sizeof y);
  return y;
}

// For run.py.
extern "C" __attribute__((used, visibility("default"))) inline void cuda_host_setup(uint64_t seed, int64_t first, int64_t last) {
  cuda_host::seed = seed, cuda_host::first_block = first, cuda_host::last_block = last;
}
extern "C" __attribute__((used, visibility("default"))) inline const char* cuda_host_error() { return cuda_host::error.c_str(); }
