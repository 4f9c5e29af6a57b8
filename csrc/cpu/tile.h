// The tile kernels: small matrix products over packed panels, and what becomes of a tile of logits or attention scores.
// One micro-kernel per instruction set; head.cpp and attention.cpp are written against this table and see no intrinsics.
//
// A panel holds K x 32 operands: fp32 as [K][32]; bf16 as [K/2][32][2], pairs of k side by side, as vdpbf16ps and
// tdpbf16ps want them. Products accumulate in fp32; the order of a sum depends on K alone.
#pragma once
#include <cstdint>

namespace longtrace {

constexpr int64_t kPanel = 32;  // columns of a panel

enum class Dtype : int { fp32 = 0, bf16 = 1, fp16 = 2 };

// A row-major matrix of some dtype; rows may be picked by index.
struct Matrix {
  const void* data;
  Dtype dtype;
  int64_t stride;               // elements from row to row
  const int64_t* rows = nullptr;  // row i is data[rows[i] * stride]; null: data[i * stride]
};

// What becomes of a tile of h.w: `rows` vocabulary rows by 32 tokens. Token arrays have 32 entries.
struct Epilogue {
  float scale;                   // s = scale * (h.w) + bias_scale * bias; with a softcap z = out * tanh(s), else z = s
  float bias_scale, softcap_out; // softcap_out 0: no softcap
  const float* bias;             // (rows,) or null
  const int32_t* target;         // row of this tile that is the token's target (any other value: not here)
  const float* maximum;          // x = z - maximum; - log_sum with coefficients
  const float* log_sum;
  const float *a, *e, *entropy;  // null in the forward: the value is exp(x); else exp(x) * (a - e * (x + entropy))
  float *sum, *peak, *dot, *mass;  // += exp(x), max= x, += x exp(x) (if not null), += value as stored (if not null)
  void* g;                       // values (times the softcap's derivative), operand dtype, row stride ldg; or null
  int64_t ldg;
};

// What becomes of a tile of attention scores k.q: `rows` keys by 32 queries. Query arrays have 32 entries.
struct Scores {
  float scale, softcap_out;      // x = scale * (k.q), in powers of two; with a softcap x = out * tanh(scale * (k.q))
  const int32_t *first, *last;   // the rows each query sees, inclusive; null: all of them
  const float* reference;        // p = 2^(x - reference); backward: p = 2^(x - reference - log_sum)
  const float* log_sum;
  float* sum;                    // forward: += p
  float* peak;                   // score_peaks: max= x - reference
  void* panel;                   // forward: p, backward: ds, as a panel of K = padded rows, zeros below
  int64_t padded;
  const float *dp, *delta;       // backward: ds = p (dp - delta) times the softcap's derivative
  void *p, *ds;                  // backward: p and ds as rows, row stride ld
  int64_t ld;
};

struct TileKernels {
  const char* name;
  bool bf16;       // operands are bf16, else fp32
  int64_t k_step;  // K is padded with zeros to a multiple of this

  // Around all products of a thread's piece of work (see Session): the state that products need, and the caller's again.
  void (*enter)(void* before);  // 64 bytes
  void (*leave)(const void* before);
  // C (rows x 32, row stride ldc) = or += A (rows x K, row stride lda) * panel (K x 32).
  void (*multiply)(int64_t rows, int64_t K, const void* A, int64_t lda, const void* panel, float* C, int64_t ldc, bool add);
  // Rows [begin, begin + rows) as operands, row stride ld, columns [columns, ld) zero.
  void (*copy_rows)(const Matrix& from, int64_t begin, int64_t rows, int64_t columns, void* out, int64_t ld);
  // Panels of the transpose: panel p, k, column j = from[32 p + j][k]; k and rows past the end are zero.
  void (*pack_transposed)(const Matrix& from, int64_t rows, int64_t K, int64_t K_padded, void* panels);
  // Panels as they lie: panel p, k, column j = scale[k] * from[begin + k][32 p + j]; past the end zero. scale may be null.
  void (*pack)(const Matrix& from, int64_t begin, int64_t K, int64_t K_padded, int64_t columns, const float* scale, void* panels);
  // out[j][k] = g[k][j] for 32 columns j and K rows k; out has row stride ldo, zeros from K to K_padded.
  void (*transpose)(const void* g, int64_t ldg, int64_t K, int64_t K_padded, void* out, int64_t ldo);
  // max over n (a multiple of 32) of scale[i] * row[i].
  float (*row_max)(const void* row, int64_t n, const float* scale);
  // out (rows x columns, row stride ldo, operands or fp32) = tile + bias; bias has 32 entries or is null.
  void (*store)(const float* tile, int64_t rows, int64_t columns, const float* bias, void* out, int64_t ldo, bool fp32);
  void (*epilogue)(const float* tile, int64_t rows, const Epilogue& how);
  void (*score_peaks)(const float* tile, int64_t rows, const Scores& how);  
  void (*softmax)(const float* tile, int64_t rows, const Scores& how);
  void (*softmax_gradient)(const float* tile, int64_t rows, const Scores& how);
};

// Products happen inside a session: setting the tile registers up takes as long as a small product.
class Session {
 public:
  explicit Session(const TileKernels& kernels) : leave_(kernels.leave) {
    if (kernels.enter) kernels.enter(before_);
  }
  ~Session() {
    if (leave_) leave_(before_);
  }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

 private:
  void (*leave_)(const void*);
  alignas(64) unsigned char before_[64];
};

extern const TileKernels tile_baseline, tile_avx2, tile_avx512, tile_avx512_bf16, tile_amx;

// The fastest kernels of this processor for operands of `dtype`; LONGTRACE_CPU_CAPABILITY asks for narrower ones.
const TileKernels& tile_kernels(Dtype dtype);

}  // namespace longtrace
