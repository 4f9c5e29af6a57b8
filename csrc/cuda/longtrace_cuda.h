// The C interface of the CUDA kernels: raw pointers, sizes and a stream, no torch. Called by kernels/cuda.py through ctypes.
// Pointers are device memory, sizes and offsets 64-bit, results CUDA error codes (0: launched). Nothing waits for the device.
#pragma once
#include <stdint.h>

#define LONGTRACE_EXPORT extern "C" __attribute__((visibility("default")))

// Advantages of rewards (offsets[groups],) in groups offsets (groups + 1,), as kernels/advantages/reference.py.
// counts (4,) must be 0: all right, all wrong, mixed, unscored.
LONGTRACE_EXPORT int longtrace_group_advantages(
    const float* rewards, const int64_t* offsets, int64_t groups, int by_std, int leave_one_out, int sample, float* values,
    bool* degenerate, unsigned long long* counts, void* stream);

// One pair of gradients; `first_chunk` is the number of chunks of the pairs before it.
struct LongtracePair {
  void* trace;
  const void* empty;
  int64_t n, first_chunk, trace_bf16, empty_bf16;  // bf16: 1, fp32: 0
};

// Elements of a chunk: what one block blends.
LONGTRACE_EXPORT int64_t longtrace_blend_chunk();

// trace = alpha trace + beta empty in all pairs; sums (4,): |trace|^2, |empty|^2, their dot, how many were not finite.
// partial: (chunks, 4) of scratch; chunks: of all pairs together.
LONGTRACE_EXPORT int longtrace_blend_gradients(
    const LongtracePair* pairs, int64_t count, int64_t chunks, float alpha, float beta, double* partial, double* sums,
    void* stream);

// Row p of document d: padded + d * document_stride + p * row_stride, and packed + (offsets[d] + p) * row_bytes; all in bytes.
// pack copies the rows of all documents into `packed`; unpack copies them back and zeroes the slots up to `width`.
LONGTRACE_EXPORT int longtrace_pack_rows(
    const char* padded, const int64_t* offsets, int64_t documents, int64_t rows, int64_t document_stride, int64_t row_stride,
    int64_t row_bytes, char* packed, void* stream);
LONGTRACE_EXPORT int longtrace_unpack_rows(
    const char* packed, const int64_t* offsets, int64_t documents, int64_t width, int64_t document_stride, int64_t row_stride,
    int64_t row_bytes, char* padded, void* stream);
