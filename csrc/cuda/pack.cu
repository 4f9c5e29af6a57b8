// Rows of a padded batch into a packed one, and back: a warp copies a row, in the widest words that rows and strides allow.
// Replaces a boolean mask's nonzero, index and index_put (and their synchronisation) by one read and one write.
#include "launch.h"
#include "longtrace_cuda.h"

namespace longtrace {
namespace {

constexpr int kRows = 8;  // of a block

__device__ int64_t warp_index() { return int64_t(blockIdx.x) * kRows + threadIdx.x / kWarp; }

template <class Word>
__global__ void pack_kernel(
    const char* padded, const int64_t* offsets, int64_t documents, int64_t rows, int64_t document_stride, int64_t row_stride,
    int64_t row_bytes, char* packed) {
  const int64_t row = warp_index();
  if (row >= rows) return;
  int64_t low = 0, high = documents;  // the last document that starts at or before `row`; empty ones come before it
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (offsets[middle] <= row ? low : high) = middle;
  }
  const Word* from = reinterpret_cast<const Word*>(padded + low * document_stride + (row - offsets[low]) * row_stride);
  Word* to = reinterpret_cast<Word*>(packed + row * row_bytes);
  for (int64_t i = threadIdx.x % kWarp; i < row_bytes / int64_t(sizeof(Word)); i += kWarp) to[i] = from[i];
}

template <class Word>
__global__ void unpack_kernel(
    const char* packed, const int64_t* offsets, int64_t documents, int64_t width, int64_t document_stride, int64_t row_stride,
    int64_t row_bytes, char* padded) {
  const int64_t slot = warp_index();
  if (slot >= documents * width) return;
  const int64_t document = slot / width, row = slot % width;
  const bool there = row < offsets[document + 1] - offsets[document];
  const Word* from = reinterpret_cast<const Word*>(packed + (offsets[document] + row) * row_bytes);
  Word* to = reinterpret_cast<Word*>(padded + document * document_stride + row * row_stride);
  for (int64_t i = threadIdx.x % kWarp; i < row_bytes / int64_t(sizeof(Word)); i += kWarp) to[i] = there ? from[i] : Word{};
}

// Whether all rows begin and end at multiples of Word.
template <class Word>
bool fits(const void* a, const void* b, int64_t document_stride, int64_t row_stride, int64_t row_bytes) {
  const uint64_t all = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | uint64_t(document_stride) |
      uint64_t(row_stride) | uint64_t(row_bytes);
  return all % sizeof(Word) == 0;
}

}  // namespace
}  // namespace longtrace

int longtrace_pack_rows(
    const char* padded, const int64_t* offsets, int64_t documents, int64_t rows, int64_t document_stride, int64_t row_stride,
    int64_t row_bytes, char* packed, void* stream) {
  using namespace longtrace;
  const auto kernel = fits<uint4>(padded, packed, document_stride, row_stride, row_bytes) ? pack_kernel<uint4>
      : fits<unsigned>(padded, packed, document_stride, row_stride, row_bytes)            ? pack_kernel<unsigned>
                                                                                          : pack_kernel<unsigned char>;
  return launch(
      kernel, ceil_div(rows, kRows), kRows * kWarp, stream, padded, offsets, documents, rows, document_stride, row_stride,
      row_bytes, packed);
}

int longtrace_unpack_rows(
    const char* packed, const int64_t* offsets, int64_t documents, int64_t width, int64_t document_stride, int64_t row_stride,
    int64_t row_bytes, char* padded, void* stream) {
  using namespace longtrace;
  const auto kernel = fits<uint4>(padded, packed, document_stride, row_stride, row_bytes) ? unpack_kernel<uint4>
      : fits<unsigned>(padded, packed, document_stride, row_stride, row_bytes)            ? unpack_kernel<unsigned>
                                                                                          : unpack_kernel<unsigned char>;
  return launch(
      kernel, ceil_div(documents * width, kRows), kRows * kWarp, stream, packed, offsets, documents, width, document_stride,
      row_stride, row_bytes, padded);
}
