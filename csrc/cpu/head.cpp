#include "head.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "scratch.h"

namespace longtrace::head {
namespace {

constexpr int64_t kRows = 128;       // vocabulary rows of a work item: its weight block stays in the L2 cache
constexpr int64_t kDepth = 512;      // vocabulary rows summed by one product of head_dh
constexpr int64_t kSums = 640 << 10;  // bytes of partial sums of a work item of head_dh: they stay in the L2 cache
constexpr int64_t kGroup = 8;        // panels of a work item
constexpr float kFarAbove = 60.0f;   // exp of more would leave too little room below fp32's largest number

int64_t operand_size(const TileKernels& k) { return k.bf16 ? 2 : 4; }

// Whether rows of m can be multiplied where they lie.
bool in_place(const TileKernels& k, const Matrix& m, int64_t K) {
  return !m.rows && m.dtype == (k.bf16 ? Dtype::bf16 : Dtype::fp32) && K % k.k_step == 0;
}

double element(const Matrix& m, int64_t i, int64_t j) {
  const int64_t at = i * m.stride + j;
  if (m.dtype == Dtype::fp32) return static_cast<const float*>(m.data)[at];
  const uint16_t bits = static_cast<const uint16_t*>(m.data)[at];
  if (m.dtype == Dtype::fp16) {
    _Float16 x;
    std::memcpy(&x, &bits, 2);
    return double(x);
  }
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

struct Target {
  double z, slope;
};

// The final logit of the target and the softcap's derivative there, in double.
Target target_logit(const Matrix& h, int64_t i, const Matrix& weight, int64_t y, int64_t H, const Transform& t) {
  double s = 0;
  for (int64_t j = 0; j < H; ++j) s += element(h, i, j) * element(weight, y, j);
  s = t.logit_scale * s + (t.bias ? t.bias[y] : 0.0);
  if (t.softcap == 0) return {s / t.temperature, 1.0};
  const double tanh = std::tanh(s / t.softcap);
  return {t.softcap * tanh / t.temperature, 1 - tanh * tanh};
}

Epilogue transform_of(const Transform& t) {
  Epilogue how{};
  const float divisor = t.softcap == 0 ? t.temperature : t.softcap;
  how.scale = t.logit_scale / divisor, how.bias_scale = 1.0f / divisor;
  how.softcap_out = t.softcap == 0 ? 0.0f : t.softcap / t.temperature;
  return how;
}

// Token vectors of one chunk, padded to whole panels.
struct Padded {
  std::vector<float> values;
  Padded(const float* from, int64_t n, float fill) : values(size_t(padded_tokens(n)), fill) {
    if (from) std::copy(from, from + n, values.begin());
  }
  const float* operator+(int64_t i) const { return values.data() + i; }
};

// The tokens of a chunk as panels of operands.
struct Tokens {
  const TileKernels& k;
  int64_t n, H, K, panels, panel_bytes;
  Buffer packed;
};

Tokens pack_tokens(const TileKernels& k, const Matrix& h, int64_t n, int64_t H, const ForEach& for_each) {
  const int64_t K = round_up(H, k.k_step), panels = padded_tokens(n) / kPanel, bytes = K * kPanel * operand_size(k);
  Tokens out{k, n, H, K, panels, bytes, scratch(panels * bytes)};
  for_each(panels, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      Matrix part = h;
      part.data = static_cast<const char*>(h.data) + p * kPanel * h.stride * (h.dtype == Dtype::fp32 ? 4 : 2);
      k.pack_transposed(part, std::min(kPanel, n - p * kPanel), H, K, out.packed.get() + p * bytes);
    }
  });
  return out;
}

// Runs `tile(block, panel, logits, rows)` for every block of kRows vocabulary rows and every panel of 32 tokens.
template <class F>
void for_tiles(const Tokens& tokens, const Matrix& weight, int64_t V, const ForEach& for_each, F tile) {
  const TileKernels& k = tokens.k;
  const int64_t size = operand_size(k), K = tokens.K, H = tokens.H;
  const int64_t blocks = (V + kRows - 1) / kRows, groups = (tokens.panels + kGroup - 1) / kGroup;
  const bool direct = in_place(k, weight, H);
  for_each(blocks * groups, [&](int64_t begin, int64_t end) {
    const Session session(k);
    Buffer copy = direct ? nullptr : scratch(kRows * K * size), logits = scratch(kRows * kPanel * 4);
    for (int64_t item = begin, held = -1; item < end; ++item) {
      const int64_t block = item / groups, rows = std::min(kRows, V - block * kRows);
      const void* A = static_cast<const char*>(weight.data) + block * kRows * weight.stride * size;
      if (!direct) {
        if (held != block) k.copy_rows(weight, block * kRows, rows, H, copy.get(), K);
        held = block, A = copy.get();
      }
      const int64_t first = item % groups * kGroup;
      for (int64_t p = first; p < std::min(first + kGroup, tokens.panels); ++p) {
        float* out = reinterpret_cast<float*>(logits.get());
        k.multiply(rows, K, A, direct ? weight.stride : K, tokens.packed.get() + p * tokens.panel_bytes, out, kPanel, false);
        tile(block, p, out, rows);
      }
    }
  });
}

// The targets of a panel as rows of a block.
void relative_targets(const int64_t* target, int64_t n, int64_t panel, int64_t block, int32_t* out) {
  for (int64_t j = 0; j < kPanel; ++j) {
    const int64_t i = panel * kPanel + j, y = i < n ? target[i] - block * kRows : -1;
    out[j] = y >= 0 && y < kRows ? int32_t(y) : -1;
  }
}

// The columns between the last panel and the row stride: zero, so that a chunk's bits are the same every time.
void clear_stride(const TileKernels& k, void* g, int64_t V, int64_t n, const ForEach& for_each) {
  const int64_t size = operand_size(k), ld = row_stride(n), used = padded_tokens(n);
  if (g && ld > used)
    for_each(V, [&](int64_t begin, int64_t end) {
      for (int64_t v = begin; v < end; ++v) std::memset(static_cast<char*>(g) + (v * ld + used) * size, 0, (ld - used) * size);
    });
}

}  // namespace

int64_t padded_tokens(int64_t n) { return round_up(n, kPanel); }

int64_t row_stride(int64_t n) { return padded_tokens(n) | kPanel; }

void forward(
    const TileKernels& k, const Matrix& h, int64_t n, int64_t H, const Matrix& weight, int64_t V, const Transform& transform,
    const int64_t* target, const TokenStats& out, void* g, const ForEach& for_each) {
  const int64_t ld = row_stride(n), blocks = (V + kRows - 1) / kRows, size = operand_size(k);
  std::vector<Target> targets(size_t(n), Target{0, 1});
  for_each(n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) targets[i] = target_logit(h, i, weight, target[i], H, transform);
  });
  // x = z - reference: any reference within e^60 of the largest logit will do, a close one keeps more digits.
  for (int64_t i = 0; i < n; ++i) out.maximum[i] = std::isfinite(targets[i].z) ? float(targets[i].z) : 0.0f;
  const int64_t kinds = 2 + (out.entropy ? 1 : 0) + (out.mass ? 1 : 0);  // sums of each block and token
  Buffer partial = scratch(blocks * kinds * ld * 4);
  const auto part = [&](int64_t block, int64_t kind) { return reinterpret_cast<float*>(partial.get()) + (block * kinds + kind) * ld; };
  const Tokens tokens = pack_tokens(k, h, n, H, for_each);
  const auto pass = [&](int64_t vocabulary, void* to) {
    const Padded maximum(out.maximum, n, INFINITY);  // exp(z - inf) = 0: padding keeps out of g
    for_tiles(tokens, weight, vocabulary, for_each, [&](int64_t block, int64_t p, const float* tile, int64_t rows) {
      const int64_t o = p * kPanel;
      int32_t where[kPanel];
      relative_targets(target, n, p, block, where);
      Epilogue how = transform_of(transform);
      how.bias = transform.bias ? transform.bias + block * kRows : nullptr;
      how.target = where, how.maximum = how.log_sum = maximum + o;
      how.sum = part(block, 0) + o, how.peak = part(block, 1) + o;
      how.dot = out.entropy ? part(block, 2) + o : nullptr, how.mass = to && out.mass ? part(block, kinds - 1) + o : nullptr;
      for (int64_t kind = 0; kind < kinds; ++kind) std::fill_n(part(block, kind) + o, kPanel, kind == 1 ? -INFINITY : 0.0f);
      if (to) how.g = static_cast<char*>(to) + (block * kRows * ld + o) * size, how.ldg = ld;
      k.epilogue(tile, rows, how);
    });
  };
  pass(std::min(V, kRows), nullptr);  // the largest of the target and the first block is close as a rule
  for (int64_t i = 0; i < n; ++i)
    if (part(0, 1)[i] > 0 && std::isfinite(part(0, 1)[i])) out.maximum[i] += part(0, 1)[i];
  clear_stride(k, g, V, n, for_each);
  std::vector<float> peak(size_t(n), 0.0f);
  for (bool again = true; again;) {
    pass(V, g);
    again = false;
    for_each(n, [&](int64_t begin, int64_t end) {
      std::fill(peak.begin() + begin, peak.begin() + end, -INFINITY);
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t i = begin; i < end; ++i) peak[i] = std::max(peak[i], part(b, 1)[i]);
    });
    for (int64_t i = 0; i < n; ++i) {
      const bool far_below = !std::isfinite(targets[i].z) && std::isfinite(peak[i]) && peak[i] < -kFarAbove;
      if (peak[i] > kFarAbove || far_below) out.maximum[i] += peak[i], again = true;
    }
  }
  std::vector<double> totals(size_t(3 * n), 0.0);
  double *rests = totals.data(), *dots = rests + n, *masses = dots + n;
  for_each(n, [&](int64_t begin, int64_t end) {
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t i = begin; i < end; ++i) {
        rests[i] += part(b, 0)[i];
        if (out.entropy) dots[i] += part(b, 2)[i];
        if (out.mass) masses[i] += part(b, kinds - 1)[i];
      }
  });
  for (int64_t i = 0; i < n; ++i) {
    const double rest = rests[i], dot = dots[i], mass = masses[i];
    const double reference = out.maximum[i], x = targets[i].z - reference, own = std::exp(x), total = rest + own;
    const double log_total = std::log(total);
    if (std::isfinite(peak[i])) out.maximum[i] = float(reference + std::max(double(peak[i]), std::isfinite(x) ? x : -INFINITY));
    out.log_sum[i] = float(log_total + reference - out.maximum[i]);
    out.log_prob[i] = float(rest < own ? -std::log1p(rest / own) : x - log_total);
    if (out.entropy) out.entropy[i] = float(log_total - (dot + (own > 0 ? x * own : 0)) / total);
    if (out.mass) out.mass[i] = float(mass / total);
    out.slope[i] = float(targets[i].slope);
    out.scale[i] = float(1 / total);
  }
}

void gradient(
    const TileKernels& k, const Matrix& h, int64_t n, int64_t H, const Matrix& weight, int64_t V, const Transform& transform,
    const int64_t* target, const TokenCoefficients& with, void* g, const ForEach& for_each) {
  const int64_t ld = row_stride(n), size = operand_size(k);
  const Padded maximum(with.maximum, n, INFINITY), log_sum(with.log_sum, n, 0), a(with.a, n, 0);
  const Padded e(with.e, n, 0), entropy(with.entropy, n, 0);
  clear_stride(k, g, V, n, for_each);
  const Tokens tokens = pack_tokens(k, h, n, H, for_each);
  for_tiles(tokens, weight, V, for_each, [&](int64_t block, int64_t p, const float* tile, int64_t rows) {
    const int64_t o = p * kPanel;
    int32_t where[kPanel];
    relative_targets(target, n, p, block, where);
    Epilogue how = transform_of(transform);
    how.bias = transform.bias ? transform.bias + block * kRows : nullptr;
    how.target = where, how.maximum = maximum + o, how.log_sum = log_sum + o;
    how.a = a + o, how.e = e + o, how.entropy = entropy + o;
    how.g = static_cast<char*>(g) + (block * kRows * ld + o) * size, how.ldg = ld;
    k.epilogue(tile, rows, how);
  });
}

// g is zipped into panels where it lies (K x 32 tokens) and right turned, 32 rows at most.
void narrow_dh(
    const TileKernels& k, const void* g, int64_t ldg, int64_t F, int64_t n, const Matrix& right, int64_t N, const float* scale,
    float* out, int64_t step, const ForEach& for_each) {
  const int64_t size = operand_size(k), panels = padded_tokens(n) / kPanel, ld = panels * kPanel;
  const int64_t together = step == 1 ? kGroup : 1;
  const int64_t ranges = std::clamp<int64_t>(F / (8 * kDepth), 1, 16), depth = round_up((F + ranges - 1) / ranges, kDepth);
  Buffer partial = scratch(ranges * N * ld * 4);
  float* sums = reinterpret_cast<float*>(partial.get());
  const Matrix operands{g, k.bf16 ? Dtype::bf16 : Dtype::fp32, ldg};
  for_each(ranges, [&](int64_t begin, int64_t end) {
    const Session session(k);
    const int64_t lda = row_stride(kDepth);
    Buffer rows = scratch(kDepth * kPanel * size), turned = scratch(kPanel * lda * size);
    Buffer panel = scratch(kGroup * kPanel * kDepth * size);
    for (int64_t range = begin; range < end; ++range) {
      const int64_t stop = std::min((range + 1) * depth, F);
      float* sum = sums + range * N * ld;
      if (range * depth >= stop) std::fill_n(sum, N * ld, 0.0f);
      for (int64_t start = range * depth; start < stop; start += kDepth) {
        const int64_t K = std::min(kDepth, stop - start), padded = round_up(K, k.k_step);
        k.copy_rows(right, start, K, N, rows.get(), kPanel);
        k.transpose(rows.get(), kPanel, K, padded, turned.get(), lda);
        for (int64_t p = 0; p < panels; p += together * step) {
          const int64_t columns = std::min(together, panels - p) * kPanel;
          Matrix part = operands;
          part.data = static_cast<const char*>(g) + p * kPanel * size;
          k.pack(part, start, K, padded, columns, nullptr, panel.get());
          for (int64_t c = 0; c < columns; c += kPanel)
            k.multiply(
                N, padded, turned.get(), lda, panel.get() + c * padded * size, sum + p * kPanel + c, ld, start != range * depth);
        }
      }
    }
  });
  for_each(n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < N && i / kPanel % step == 0; ++j) {
        float total = 0;
        for (int64_t r = 0; r < ranges; ++r) total += sums[(r * N + j) * ld + i];
        out[i * N + j] = scale ? total * scale[i] : total;
      }
  });
}

void dh(
    const TileKernels& k, const void* g, int64_t ldg, int64_t F, int64_t n, const Matrix& right, int64_t N, const float* scale,
    float* out, const ForEach& for_each) {
  if (N <= kPanel) return narrow_dh(k, g, ldg, F, n, right, N, scale, out, 1, for_each);
  const int64_t size = operand_size(k), columns = round_up(N, kPanel), panels = padded_tokens(n) / kPanel;
  // The rows of g are cut in ranges whose sums are added in order: their number depends on F and N, never on threads or n.
  const int64_t affordable = std::max<int64_t>(1, (64 << 20) / (1024 * columns * 4));
  const int64_t ranges = std::clamp<int64_t>((F + 8 * kDepth - 1) / (8 * kDepth), 1, std::min<int64_t>(16, affordable));
  const int64_t depth = round_up((F + ranges - 1) / ranges, kDepth), fit = std::max<int64_t>(kRows / kPanel, kSums / (kPanel * columns * 4));
  const int64_t groups = (panels + fit - 1) / fit, per_group = (panels + groups - 1) / groups, slab = panels * kPanel * columns;
  Buffer partial = scratch(ranges * slab * 4);
  float* sums = reinterpret_cast<float*>(partial.get());
  for_each(ranges * groups, [&](int64_t begin, int64_t end) {
    const Session session(k);
    Buffer weights = scratch(kDepth * columns * size), turned = scratch(kRows * row_stride(kDepth) * size);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t range = item / groups, first = item % groups * per_group, last = std::min(first + per_group, panels);
      const int64_t stop = std::min((range + 1) * depth, F);
      if (range * depth >= stop) std::fill(sums + range * slab + first * kPanel * columns, sums + range * slab + last * kPanel * columns, 0.0f);
      for (int64_t start = range * depth; start < stop; start += kDepth) {
        const int64_t K = std::min(kDepth, stop - start), padded = round_up(K, k.k_step);
        k.pack(right, start, K, padded, N, nullptr, weights.get());
        for (int64_t p = first; p < last; p += kRows / kPanel) {
          const int64_t tokens = std::min(kRows, (last - p) * kPanel), lda = row_stride(kDepth);
          for (int64_t v = 0; v < padded; v += kPanel)  // rows of g are read end to end
            for (int64_t t = 0; t < tokens; t += kPanel)
              k.transpose(
                  static_cast<const char*>(g) + ((start + v) * ldg + p * kPanel + t) * size, ldg,
                  std::clamp<int64_t>(K - v, 0, kPanel), std::min(kPanel, padded - v), turned.get() + (t * lda + v) * size, lda);
          for (int64_t c = 0; c < columns; c += kPanel)
            k.multiply(
                tokens, padded, turned.get(), lda, weights.get() + c * padded * size,
                sums + range * slab + p * kPanel * columns + c, columns, start != range * depth);
        }
      }
    }
  });
  for_each(n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* row = out + i * N;
      for (int64_t j = 0; j < N; ++j) {
        float total = 0;
        for (int64_t r = 0; r < ranges; ++r) total += sums[r * slab + i * columns + j];
        row[j] = scale ? total * scale[i] : total;
      }
    }
  });
}

void dw(
    const TileKernels& k, const void* g, int64_t ldg, int64_t F, int64_t n, const Matrix& right, int64_t N, const float* scale,
    float* out, int64_t ldo, const int64_t* rows, bool add, const ForEach& for_each) {
  const int64_t K = padded_tokens(n), size = operand_size(k), panels = (N + kPanel - 1) / kPanel;
  const int64_t panel_bytes = K * kPanel * size;
  Buffer packed = scratch(panels * panel_bytes);
  k.pack(right, 0, n, K, N, scale, packed.get());
  for_each((F + kRows - 1) / kRows, [&](int64_t begin, int64_t end) {
    const Session session(k);
    Buffer product = scratch(kRows * kPanel * 4);
    float* tile = reinterpret_cast<float*>(product.get());
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kRows, count = std::min(kRows, F - first);
      const void* A = static_cast<const char*>(g) + first * ldg * size;
      for (int64_t p = 0; p < panels; ++p) {
        k.multiply(count, K, A, ldg, packed.get() + p * panel_bytes, tile, kPanel, false);
        const int64_t width = std::min(kPanel, N - p * kPanel);
        for (int64_t i = 0; i < count; ++i) {
          float* row = out + (rows ? rows[first + i] : first + i) * ldo + p * kPanel;
          const float* from = tile + i * kPanel;
          if (add)
            for (int64_t j = 0; j < width; ++j) row[j] += from[j];
          else
            std::memcpy(row, from, width * 4);
        }
      }
    }
  });
}

void column_max(
    const TileKernels& k, const void* g, int64_t ldg, int64_t F, int64_t n, const float* scale, float* out, const ForEach& for_each) {
  const Padded padded(scale, n, 0.0f);
  for_each(F, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v)
      out[v] = k.row_max(static_cast<const char*>(g) + v * ldg * operand_size(k), padded_tokens(n), padded + 0);
  });
}

}  // namespace longtrace::head
