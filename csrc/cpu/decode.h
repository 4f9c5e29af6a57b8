// One query a document over the keys it has so far: what decoding asks of attention. Reads the cache once, packs nothing.
// One unit per instruction set (decode.inc); arithmetic in fp32.
#pragma once
#include "tile.h"

namespace longtrace {

// The queries of the heads that share a kv head, at one position, and the keys they see: rows of k and v a stride apart.
struct Decode {
  const void *q, *k, *v;  // q (group, D), k (keys, D), v (keys, Dv), in the operand dtype
  void* out;              // (group, Dv)
  Dtype dtype;            // fp32 or bf16
  int64_t group, D, Dv, keys, k_stride, v_stride;
  float scale, softcap;  // softcap 0: none
  const float* sinks;    // (group,) or null
};

using DecodeKernel = void (*)(const Decode&);

extern const DecodeKernel decode_baseline, decode_avx2, decode_avx512;

// The widest of this processor; LONGTRACE_CPU_CAPABILITY asks for narrower ones.
DecodeKernel decode_kernel();

}  // namespace longtrace
