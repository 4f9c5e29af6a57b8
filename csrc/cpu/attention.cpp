#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "scratch.h"

namespace longtrace::attention {
namespace {

constexpr int64_t kKeys = 256;      // keys of a block
constexpr int64_t kForwardRows = 256;   // folded query rows of a block: the forward's products want many,
constexpr int64_t kBackwardRows = 128;  // the backward's want their rows of p and ds near
constexpr float kFarAbove = 0x1p60f;   // a block's sum of 2^(x - reference): totals keep room below fp32's largest number
constexpr float kLog2e = 1.44269504088896341f;

struct Range {  // keys [first, last] of a document; empty if last < first
  int64_t first, last;
};

// One document and kv head: its folded query rows and its keys.
struct Head {
  const Problem& p;
  int64_t kv_head, group, q_start, k_start, queries, keys, rows;

  Head(const Problem& problem, int64_t document, int64_t kv)
      : p(problem), kv_head(kv), group(problem.heads / problem.kv_heads), q_start(problem.starts_q[document]),
        k_start(problem.starts_k[document]), queries(problem.starts_q[document + 1] - q_start),
        keys(problem.starts_k[document + 1] - k_start), rows(queries * group) {}

  // Where row r lies: row of q as (T * heads, D), of lse as (T * heads,).
  int64_t row(int64_t r) const { return (q_start + r / group) * p.heads + kv_head * group + r % group; }
  int64_t key(int64_t j) const { return (k_start + j) * p.kv_heads + kv_head; }

  Range sees(int64_t r) const {
    const int64_t at = r / group + keys - queries, right = p.causal ? 0 : p.right;
    return {p.left >= 0 ? std::max<int64_t>(0, at - p.left) : 0, right >= 0 ? std::min(keys - 1, at + right) : keys - 1};
  }
  // What rows [begin, end) see between them; ranges only move forward from row to row.
  Range sees(int64_t begin, int64_t end) const { return {sees(begin).first, sees(end - 1).last}; }
};

int64_t size_of(const TileKernels& k) { return k.bf16 ? 2 : 4; }
Dtype dtype_of(const TileKernels& k) { return k.bf16 ? Dtype::bf16 : Dtype::fp32; }

// A dense (rows, width) matrix of operands whose rows are picked by `at`.
Matrix picked(const TileKernels& k, const void* data, int64_t width, const int64_t* at) {
  return {data, dtype_of(k), width, at};
}

const char* at(const TileKernels& k, const void* data, int64_t index) { return static_cast<const char*>(data) + index * size_of(k); }

void store(const TileKernels& k, void* out, int64_t index, float x) {
  if (!k.bf16) {
    static_cast<float*>(out)[index] = x;
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  static_cast<uint16_t*>(out)[index] = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float read(const TileKernels& k, const void* from, int64_t index) {
  if (!k.bf16) return static_cast<const float*>(from)[index];
  const uint32_t bits = uint32_t(static_cast<const uint16_t*>(from)[index]) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// 32 rows of out, `width` columns each, from sums (width, 32).
void store_turned(const TileKernels& k, const Head& head, const float* sums, int64_t first, int64_t width, const float* scale, void* out) {
  const int64_t rows = std::min(kPanel, head.rows - first);
  for (int64_t j = 0; j < rows; ++j) {
    const int64_t base = head.row(first + j) * width;
    for (int64_t d = 0; d < width; ++d) store(k, out, base + d, sums[d * kPanel + j] * scale[j]);
  }
}

// What one panel of rows sees of keys [begin, end): relative to begin, for the kernels that ask.
struct Visible {
  int32_t first[kPanel], last[kPanel];
  int64_t begin, end;  // the keys worth computing, relative to the block, begin a multiple of 32
  bool masked;

  Visible(const Head& head, int64_t row, int64_t block, int64_t block_end) {
    const int64_t count = std::min(kPanel, head.rows - row);
    const Range top = head.sees(row), bottom = head.sees(row + count - 1);  // ranges only move forward
    begin = std::max<int64_t>(0, top.first - block) / kPanel * kPanel;
    end = std::min(block_end - 1, bottom.last) - block + 1;
    masked = count < kPanel || bottom.first > block + begin || top.last < block + end - 1;
    for (int64_t j = 0; j < kPanel && masked && !empty(); ++j) {
      const Range own = j < count ? head.sees(row + j) : Range{0, -1};
      first[j] = int32_t(std::clamp<int64_t>(own.first - block, 0, kKeys) - begin);
      last[j] = int32_t(std::clamp<int64_t>(own.last - block, -1, kKeys) - begin);
    }
  }
  bool empty() const { return end <= begin; }
};

Scores scores_of(const Problem& p, const Visible& visible) {
  Scores how{};
  how.scale = p.softcap == 0 ? p.scale * kLog2e : p.scale / p.softcap;
  how.softcap_out = p.softcap * kLog2e;
  if (visible.masked) how.first = visible.first, how.last = visible.last;
  return how;
}

// The rows of a block of queries, packed once for all key blocks.
struct QueryBlock {
  int64_t begin, rows, panels;
  std::vector<int64_t> where;

  QueryBlock(const Head& head, int64_t block, int64_t size) : begin(block * size), rows(std::min(size, head.rows - begin)),
      panels((rows + kPanel - 1) / kPanel), where(size_t(rows)) {
    for (int64_t r = 0; r < rows; ++r) where[r] = head.row(begin + r);
  }
};

struct Item {
  int64_t document, block;
};

// The blocks of all documents, in order: `size` query rows each, or kKeys keys if 0.
std::vector<Item> items_of(const Problem& p, int64_t size) {
  std::vector<Item> items;
  for (int64_t i = 0; i < p.documents; ++i) {
    const Head head(p, i, 0);
    const int64_t length = size ? head.rows : head.keys, step = size ? size : kKeys;
    for (int64_t b = 0; b * step < length; ++b) items.push_back({i, b});
  }
  return items;
}

}  // namespace

void forward(const TileKernels& k, const Problem& p, void* out, float* reference_out, float* log_sum_out, const ForEach& for_each) {
  const std::vector<Item> items = items_of(p, kForwardRows), key_blocks = items_of(p, 0);
  const int64_t size = size_of(k), panels = kForwardRows / kPanel, q_panel = p.D * kPanel * size, sums = p.Dv * kPanel;
  // Values turned, a block of keys and a kv head at a time; rows of an odd number of panels spread over the cache's sets.
  const auto stride = [](int64_t keys) { return round_up(keys, kPanel) | kPanel; };
  std::vector<int64_t> first_block(size_t(p.documents), 0), turned_at;
  int64_t turned_size = 0;
  for (const Item& item : key_blocks) {
    if (!item.block) first_block[item.document] = int64_t(turned_at.size());
    turned_at.push_back(turned_size);
    turned_size += p.kv_heads * p.Dv * stride(std::min(kKeys, Head(p, item.document, 0).keys - item.block * kKeys)) * size;
  }
  Buffer values = scratch(turned_size);
  for_each(int64_t(key_blocks.size()) * p.kv_heads, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const Item item = key_blocks[n / p.kv_heads];
      const Head head(p, item.document, n % p.kv_heads);
      const int64_t start = item.block * kKeys, count = std::min(kKeys, head.keys - start), ld = stride(count);
      char* turned = values.get() + turned_at[n / p.kv_heads] + head.kv_head * p.Dv * ld * size;
      for (int64_t d = 0; d < p.Dv; d += kPanel)
        k.transpose(
            at(k, p.v, head.key(start) * p.Dv + d), p.kv_heads * p.Dv, count, round_up(count, kPanel),
            turned + d * ld * size, ld);
    }
  });
  for_each(int64_t(items.size()) * p.kv_heads, [&](int64_t begin, int64_t end) {
    const Session session(k);
    Buffer q_panels = scratch(panels * q_panel);
    Buffer tile_buffer = scratch(kKeys * kPanel * 4), p_panel = scratch((kKeys + kPanel) * kPanel * size);
    Buffer output = scratch(panels * sums * 4);
    float *tile = as_floats(tile_buffer), *outputs = as_floats(output);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t index = int64_t(items.size()) * p.kv_heads - 1 - n;  // long rows of a causal document come first
      const Item item = items[index / p.kv_heads];
      const Head head(p, item.document, index % p.kv_heads);
      const QueryBlock queries(head, item.block, kForwardRows);
      float reference[kForwardRows], sum[kForwardRows] = {};
      std::fill_n(reference, kForwardRows, -INFINITY);
      std::fill_n(outputs, panels * sums, 0.0f);
      k.pack_transposed(picked(k, p.q, p.D, queries.where.data()), queries.rows, p.D, p.D, q_panels.get());
      const Range seen = head.sees(queries.begin, queries.begin + queries.rows);
      for (int64_t block = seen.first / kKeys * kKeys; block <= seen.last; block += kKeys) {
        const int64_t stop = std::min(block + kKeys, head.keys), ld = stride(stop - block);
        const char* turned = values.get() + turned_at[first_block[item.document] + block / kKeys] + head.kv_head * p.Dv * ld * size;
        for (int64_t panel = 0; panel < queries.panels; ++panel) {
          const Visible visible(head, queries.begin + panel * kPanel, block, stop);
          if (visible.empty()) continue;
          const int64_t keys = visible.end - visible.begin;
          k.multiply(
              keys, p.D, at(k, p.k, head.key(block + visible.begin) * p.D), p.kv_heads * p.D, q_panels.get() + panel * q_panel, tile,
              kPanel, false);
          float *own = reference + panel * kPanel, *total = sum + panel * kPanel, *result = outputs + panel * sums;
          alignas(64) float from[kPanel], found[kPanel], peak[kPanel];
          Scores how = scores_of(p, visible);
          how.reference = from, how.sum = found, how.peak = peak, how.panel = p_panel.get(), how.padded = round_up(keys, k.k_step);
          const auto start = [&] {
            for (int64_t j = 0; j < kPanel; ++j) from[j] = std::isfinite(own[j]) ? own[j] : 0.0f, found[j] = 0, peak[j] = -INFINITY;
          };
          start();
          // Any reference within 2^60 of the largest score will do: the first block's largest, moved when that proves low.
          if (std::any_of(own, own + kPanel, [](float x) { return x == -INFINITY; })) {
            k.score_peaks(tile, keys, how);
            for (int64_t j = 0; j < kPanel; ++j)
              if (own[j] == -INFINITY) own[j] = peak[j];
            start();
          }
          k.softmax(tile, keys, how);
          if (std::any_of(found, found + kPanel, [](float x) { return x > kFarAbove; })) {
            k.score_peaks(tile, keys, how);
            for (int64_t j = 0; j < kPanel; ++j) {
              if (!(found[j] > kFarAbove)) continue;
              const float factor = std::exp2(-peak[j]);
              own[j] = from[j] + peak[j], total[j] *= factor;
              for (int64_t d = 0; d < p.Dv; ++d) result[d * kPanel + j] *= factor;
            }
            start();
            k.softmax(tile, keys, how);
          }
          for (int64_t j = 0; j < kPanel; ++j) total[j] += found[j];
          k.multiply(p.Dv, how.padded, turned + visible.begin * size, ld, p_panel.get(), result, kPanel, true);
        }
      }
      for (int64_t panel = 0; panel < queries.panels; ++panel) {
        float inverse[kPanel];
        for (int64_t j = 0; j < std::min(kPanel, queries.rows - panel * kPanel); ++j) {
          const int64_t r = panel * kPanel + j, where = queries.where[r];
          float own = std::isfinite(reference[r]) ? reference[r] : 0.0f, total = sum[r], weight = 1.0f;
          if (p.sinks) {  // the sink joins the sum, and the outputs shrink by its share
            const float sink = p.sinks[where % p.heads] * kLog2e, top = std::max(own, sink);
            weight = total > 0 ? std::exp2(own - top) : 0.0f;
            total = total * weight + std::exp2(sink - top), own = top;
          }
          inverse[j] = total == 0.0f ? 0.0f : weight / total;
          reference_out[where] = own, log_sum_out[where] = total == 0.0f ? INFINITY : std::log2(total);
        }
        store_turned(k, head, outputs + panel * sums, queries.begin + panel * kPanel, p.Dv, inverse, out);
      }
    }
  });
}

void backward(
    const TileKernels& k, const Problem& p, const void* out, const void* grad_out, const float* reference,
    const float* log_sum, float* delta, void* dq, void* dk, void* dv, const ForEach& for_each) {
  const int64_t size = size_of(k), T = p.starts_q[p.documents];
  for_each((T * p.heads + 1023) / 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * 1024; i < std::min(end * 1024, T * p.heads); ++i) {
      double s = 0;
      for (int64_t d = 0; d < p.Dv; ++d) s += double(read(k, out, i * p.Dv + d)) * read(k, grad_out, i * p.Dv + d);
      delta[i] = float(s);
    }
  });

  // dq of a block of rows takes key blocks in order: `turn` holds the one whose time has come.
  struct Turns {
    int64_t panel, block;  // where this document and kv head begin in `sums` (in panels) and in `turn`
  };
  std::vector<Turns> turns;
  int64_t all_panels = 0, all_blocks = 0;
  for (int64_t i = 0; i < p.documents; ++i)
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      turns.push_back({all_panels, all_blocks});
      const int64_t rows = Head(p, i, h).rows;
      all_panels += (rows + kPanel - 1) / kPanel, all_blocks += (rows + kBackwardRows - 1) / kBackwardRows;
    }
  std::unique_ptr<std::atomic<int64_t>[]> turn(new std::atomic<int64_t>[size_t(all_blocks)]);
  for (int64_t i = 0; i < all_blocks; ++i) turn[i] = -1;
  const int64_t panel_sums = p.D * kPanel;
  Buffer dq_buffer = scratch(all_panels * panel_sums * 4);
  float* dq_sums = as_floats(dq_buffer);

  const std::vector<Item> items = items_of(p, 0);
  std::atomic<bool> failed{false};
  const auto work = [&](int64_t begin, int64_t end) {
    const Session session(k);
    const int64_t panels = kBackwardRows / kPanel, ld = kBackwardRows | kPanel, ldk = kKeys + kPanel;
    Buffer keys_turned = scratch(p.D * ldk * size), q_turned = scratch(kBackwardRows * p.D * size), q_natural = scratch(kBackwardRows * p.D * size);
    Buffer do_turned = scratch(kBackwardRows * p.Dv * size), do_natural = scratch(kBackwardRows * p.Dv * size);
    Buffer s_tile = scratch(kKeys * kPanel * 4), dp_tile = scratch(kKeys * kPanel * 4);
    Buffer p_rows = scratch(kKeys * ld * size), ds_rows = scratch(kKeys * ld * size);
    Buffer ds_panels = scratch(panels * (kKeys + kPanel) * kPanel * size);
    Buffer dk_buffer = scratch(kKeys * p.D * 4), dv_buffer = scratch(kKeys * p.Dv * 4);
    float *dk_sums = as_floats(dk_buffer), *dv_sums = as_floats(dv_buffer);
    for (int64_t n = begin; n < end; ++n) {
      const Item item = items[n / p.kv_heads];
      const int64_t kv_head = n % p.kv_heads, block = item.block * kKeys;
      const Head head(p, item.document, kv_head);
      const Turns mine = turns[item.document * p.kv_heads + kv_head];
      const int64_t stop = std::min(block + kKeys, head.keys), count = stop - block, padded = round_up(count, kPanel);
      std::fill_n(dk_sums, kKeys * p.D, 0.0f);
      std::fill_n(dv_sums, kKeys * p.Dv, 0.0f);
      for (int64_t d = 0; d < p.D; d += kPanel)
        k.transpose(at(k, p.k, head.key(block) * p.D + d), p.kv_heads * p.D, count, padded, keys_turned.get() + d * ldk * size, ldk);
      for (int64_t b = 0; b * kBackwardRows < head.rows; ++b) {
        const int64_t rows = std::min(kBackwardRows, head.rows - b * kBackwardRows);
        const Range seen = head.sees(b * kBackwardRows, b * kBackwardRows + rows);
        if (seen.first >= stop || seen.last < block) continue;
        const QueryBlock queries(head, b, kBackwardRows);
        const Matrix q = picked(k, p.q, p.D, queries.where.data()), grad = picked(k, grad_out, p.Dv, queries.where.data());
        const int64_t depth = round_up(rows, kPanel);
        k.pack_transposed(q, rows, p.D, p.D, q_turned.get());
        k.pack_transposed(grad, rows, p.Dv, p.Dv, do_turned.get());
        k.pack(q, 0, rows, depth, p.D, nullptr, q_natural.get());
        k.pack(grad, 0, rows, depth, p.Dv, nullptr, do_natural.get());
        std::vector<Visible> visible;
        for (int64_t panel = 0; panel < queries.panels; ++panel) {
          const int64_t row = b * kBackwardRows + panel * kPanel;
          visible.emplace_back(head, row, block, stop);
          const Visible& see = visible.back();
          const int64_t keys = std::max<int64_t>(0, see.end - see.begin);
          char *p_at = p_rows.get() + panel * kPanel * size, *ds_at = ds_rows.get() + panel * kPanel * size;
          for (int64_t i = 0; i < count; ++i)  // the keys this panel does not see
            if (i < see.begin || i >= see.end) std::memset(p_at + i * ld * size, 0, kPanel * size), std::memset(ds_at + i * ld * size, 0, kPanel * size);
          if (!keys) continue;
          const int64_t first = head.key(block + see.begin);
          k.multiply(
              keys, p.D, at(k, p.k, first * p.D), p.kv_heads * p.D, q_turned.get() + panel * kPanel * p.D * size, as_floats(s_tile), kPanel, false);
          k.multiply(
              keys, p.Dv, at(k, p.v, first * p.Dv), p.kv_heads * p.Dv, do_turned.get() + panel * kPanel * p.Dv * size, as_floats(dp_tile), kPanel,
              false);
          float from[kPanel] = {}, sums[kPanel], deltas[kPanel] = {};
          std::fill_n(sums, kPanel, INFINITY);  // p = 0 past the last row
          for (int64_t j = 0; j < std::min(kPanel, rows - panel * kPanel); ++j) {
            const int64_t where = queries.where[panel * kPanel + j];
            from[j] = reference[where], sums[j] = log_sum[where], deltas[j] = delta[where];
          }
          Scores how = scores_of(p, see);
          how.reference = from, how.log_sum = sums, how.delta = deltas, how.dp = as_floats(dp_tile), how.padded = round_up(keys, k.k_step);
          how.panel = ds_panels.get() + panel * (kKeys + kPanel) * kPanel * size;
          how.p = p_at + see.begin * ld * size, how.ds = ds_at + see.begin * ld * size, how.ld = ld;
          k.softmax_gradient(as_floats(s_tile), keys, how);
        }
        std::atomic<int64_t>& now = turn[mine.block + b];
        const int64_t first_block = seen.first / kKeys;
        for (int64_t spin = 0; item.block > first_block && now.load(std::memory_order_acquire) != item.block - 1; ++spin) {
          if (failed) return;
          if (spin > 100) std::this_thread::yield();
        }
        for (int64_t panel = 0; panel < queries.panels; ++panel) {
          const Visible& see = visible[panel];
          float* sums = dq_sums + (mine.panel + b * panels + panel) * panel_sums;
          if (item.block == first_block) std::fill_n(sums, panel_sums, 0.0f);
          if (see.empty()) continue;
          k.multiply(
              p.D, round_up(see.end - see.begin, k.k_step), keys_turned.get() + see.begin * size, ldk,
              ds_panels.get() + panel * (kKeys + kPanel) * kPanel * size, sums, kPanel, true);
        }
        now.store(item.block, std::memory_order_release);
        for (int64_t i = 0; i < count; i += kPanel) {  // the rows of a product are used again while they are near
          const int64_t some = std::min(kPanel, count - i);
          for (int64_t d = 0; d < p.Dv; d += kPanel)
            k.multiply(some, depth, p_rows.get() + i * ld * size, ld, do_natural.get() + d * depth * size, dv_sums + i * p.Dv + d, p.Dv, true);
          for (int64_t d = 0; d < p.D; d += kPanel)
            k.multiply(some, depth, ds_rows.get() + i * ld * size, ld, q_natural.get() + d * depth * size, dk_sums + i * p.D + d, p.D, true);
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t key = head.key(block + i);
        for (int64_t d = 0; d < p.D; ++d) store(k, dk, key * p.D + d, p.scale * dk_sums[i * p.D + d]);
        for (int64_t d = 0; d < p.Dv; ++d) store(k, dv, key * p.Dv + d, dv_sums[i * p.Dv + d]);
      }
    }
  };
  for_each(int64_t(items.size()) * p.kv_heads, [&](int64_t begin, int64_t end) {
    try {
      work(begin, end);
    } catch (...) {  // who waits for this item's turn must not wait for ever
      failed = true;
      throw;
    }
  });

  const std::vector<Item> rows = items_of(p, kBackwardRows);
  for_each(int64_t(rows.size()) * p.kv_heads, [&](int64_t begin, int64_t end) {
    float scale[kPanel];
    for (int64_t n = begin; n < end; ++n) {
      const Item item = rows[n / p.kv_heads];
      const Head head(p, item.document, n % p.kv_heads);
      const Turns mine = turns[item.document * p.kv_heads + n % p.kv_heads];
      const bool blind = turn[mine.block + item.block] == -1;  // no query of the block sees a key
      std::fill_n(scale, kPanel, p.scale);
      for (int64_t r = item.block * kBackwardRows; r < std::min(head.rows, (item.block + 1) * kBackwardRows); r += kPanel) {
        float* sums = dq_sums + (mine.panel + r / kPanel) * panel_sums;
        if (blind) std::fill_n(sums, panel_sums, 0.0f);
        store_turned(k, head, sums, r, p.D, scale, dq);
      }
    }
  });
}

}  // namespace longtrace::attention
