"""Packed attention, forward, in one Triton kernel: softmax(q k^T) v per document, with what the backward needs of each row.

What: an online softmax over the key blocks a block of queries can see. Replaces: SDPA per document, and plain maths
for softcap and sinks. Why faster: scores stay in registers, one launch for all documents, blocks out of sight are
skipped, and only blocks on an edge of the mask are masked.
Documents are found on the device, so no offset is read back. No atomics and sums in a fixed order: a document's bits
depend on nothing else in the pack. Tested in the interpreter, compiled ahead of time; not timed on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longtrace.kernels.head.triton_rows import INTERPRETED, rounded, tanh

LOG2_E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def dot(x, y, total):
    """total + x y in fp32; the interpreter would multiply the bit patterns of bf16, so it gets them widened (exact)."""
    if INTERPRETED:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, total, input_precision="ieee")


@triton.jit
def product(x, y, ROWS: tl.constexpr, COLS: tl.constexpr):
    """x y in fp32."""
    return dot(x, y, tl.zeros((ROWS, COLS), tl.float32))


@triton.jit
def locate(offsets, slot, documents, steps, BLOCK: tl.constexpr):
    """(first token, length, block) of the document that owns `slot`; the block may lie past its end.

    Document i owns the slots from offsets[i] // BLOCK + i on, up to the next document's: as many as it has blocks, or
    one more. So T // BLOCK + documents slots serve any offsets. steps = ceil(log2(documents)).
    """
    i = 0
    for b in range(0, steps):
        ahead = i + (1 << (steps - 1 - b))
        start = tl.load(offsets + ahead, mask=ahead < documents, other=0)
        i = tl.where((ahead < documents) & (start // BLOCK + ahead <= slot), ahead, i)
    first = tl.load(offsets + i)
    return i, first, tl.load(offsets + i + 1) - first, slot - (first // BLOCK + i)


@triton.jit
def rows_of(
    at, stride, first, count, width, ROWS: tl.constexpr, COLS: tl.constexpr, EDGE: tl.constexpr, PADDED: tl.constexpr
):
    """(ROWS, COLS) from row `first` of the `count` that exist; 0 past the end (EDGE) and past `width` (PADDED).

    The block's first row is counted in 64 bits, the rest of it in 32: see NEAR, which bounds the stride of inputs. That of
    `store_rows` is of a dense output, heads times width: less than NEAR for as many heads as a grid can have.
    """
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    at += tl.cast(first, tl.int64) * stride
    at += row[:, None] * stride + col[None, :]
    if EDGE and PADDED:
        return tl.load(at, mask=(row < count - first)[:, None] & (col < width)[None, :], other=0.0)
    if EDGE:
        return tl.load(at, mask=(row < count - first)[:, None], other=0.0)
    if PADDED:
        return tl.load(at, mask=(col < width)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def store_rows(out, stride, x, first, count, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows `first`... of `out` <- x, rounded, where they exist."""
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    out += tl.cast(first, tl.int64) * stride
    keep = (row < count - first)[:, None] & (col < width)[None, :]
    tl.store(out + row[:, None] * stride + col[None, :], rounded(x, out.dtype.element_ty), mask=keep)


@triton.jit
def capped(s, inner, HAS_CAP: tl.constexpr):
    """Raw scores, or tanh(inner s) under a softcap: the softmax is of powers 2^(outer .); see `factors` in cuda.py.

    Maxima are taken and subtracted before `outer` comes in: a large offset of all scores then costs no digits.
    """
    if HAS_CAP:
        s = tanh(s * inner)
    return s


@triton.jit
def seen(ahead, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Whether a key that stands `ahead` places after a query's own is visible to it."""
    see = ahead == ahead
    if HAS_RIGHT:
        see = ahead <= right
    if HAS_LEFT:
        see = see & (ahead >= -left)
    return see


@triton.jit
def key_blocks(
    m0, q_len, k_len, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(first key, end, where full blocks begin, where they end) for the queries from m0 on.

    Blocks before and after the full ones need a mask. Query i stands at key i + k_len - q_len.
    """
    stand = m0 + k_len - q_len
    last = tl.minimum(m0 + BLOCK_M, q_len) - 1 + k_len - q_len
    low, high, inside, outside = 0, k_len, 0, k_len
    if HAS_LEFT:
        low = tl.maximum(stand - left, 0)
        inside = tl.maximum(last - left - low, 0)
    if HAS_RIGHT:
        high = tl.minimum(last + right + 1, k_len)
        outside = tl.minimum(stand + right + 1, k_len)
    high = tl.maximum(high, low)
    begin = tl.minimum(low + (inside + BLOCK_N - 1) // BLOCK_N * BLOCK_N, high)
    end = tl.maximum(begin, low + tl.maximum(outside - low, 0) // BLOCK_N * BLOCK_N)
    return low, high, begin, end


@triton.jit
def attend(
    acc, total, top, q, k, v, begin, end, stand, k_len, k_stride, v_stride, inner, outer, left, right, D, DV,
    EDGE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_CAP: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The online softmax over the keys begin..end; (acc, total, top) are sums of p v and of p, and the maximum."""
    row, col = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    for n0 in range(begin, end, BLOCK_N):
        keys = rows_of(k, k_stride, n0, k_len, D, BLOCK_N, BLOCK_D, EDGE, PADDED)
        z = capped(product(q, tl.trans(keys), BLOCK_M, BLOCK_N), inner, HAS_CAP)
        if EDGE:
            see = (n0 + col < k_len)[None, :]
            see = see & seen((n0 + col)[None, :] - (stand + row)[:, None], left, right, HAS_LEFT, HAS_RIGHT)
            z = tl.where(see, z, -INFINITY)
        new = tl.maximum(top, tl.max(z, 1))
        base = tl.where(new == -INFINITY, 0.0, new)  # a row that has seen nothing: all terms are exp2(-inf) = 0
        p = tl.exp2((z - base[:, None]) * outer)
        fade = tl.exp2((top - base) * outer)
        total = total * fade + tl.sum(p, 1)
        values = rows_of(v, v_stride, n0, k_len, DV, BLOCK_N, BLOCK_DV, EDGE, PADDED)
        acc = dot(rounded(p, v.dtype.element_ty), values, acc * fade[:, None])
        top = new
    return acc, total, top


SIZES = [
    "documents", "steps", "T", "heads", "group", "D", "DV", "left", "right",
    "q_stride", "q_head", "k_stride", "k_head", "v_stride", "v_head",
]  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, sinks, offsets_q, offsets_k, out, stats,
    documents, steps, T, heads, group, D, DV, q_stride, q_head, k_stride, k_head, v_stride, v_head,
    inner, outer, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """What: out of a block of queries of one head; the maximum and log2 of the sum of powers of each row.
    Replaces: two products and a softmax. Why: see the file; a sink is where the running maximum and sum begin, so it costs nothing.
    """
    head = tl.program_id(1).to(tl.int64)
    i, first, q_len, block = locate(offsets_q, tl.program_id(0), documents, steps, BLOCK_M)
    blocks = (q_len + BLOCK_M - 1) // BLOCK_M
    if block < blocks:
        m0 = (blocks - 1 - block) * BLOCK_M  # the last queries see most: they start first
        first_k = tl.load(offsets_k + i)
        k_len = tl.load(offsets_k + i + 1) - first_k
        # Strides and widths are multiples of 8 (see cuda.py): said here, so that loads are wide.
        q_stride, k_stride, v_stride = q_stride // 8 * 8, k_stride // 8 * 8, v_stride // 8 * 8
        q_head, k_head, v_head = q_head // 8 * 8, k_head // 8 * 8, v_head // 8 * 8
        D, DV = D // 8 * 8, DV // 8 * 8
        q += first.to(tl.int64) * q_stride + head * q_head
        k += first_k.to(tl.int64) * k_stride + head // group * k_head
        v += first_k.to(tl.int64) * v_stride + head // group * v_head
        x = rows_of(q, q_stride, m0, q_len, D, BLOCK_M, BLOCK_D, True, PADDED)
        acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        if HAS_SINKS:
            top = tl.zeros((BLOCK_M,), tl.float32) + tl.load(sinks + head).to(tl.float32) * (LOG2_E / outer)
            total += 1.0
        low, high, begin, end = key_blocks(m0, q_len, k_len, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N)
        stand = m0 + k_len - q_len
        if HAS_LEFT:
            acc, total, top = attend(
                acc, total, top, x, k, v, low, begin, stand, k_len, k_stride, v_stride, inner, outer, left, right, D, DV,
                True, HAS_LEFT, HAS_RIGHT, HAS_CAP, PADDED, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
        acc, total, top = attend(
            acc, total, top, x, k, v, begin, end, stand, k_len, k_stride, v_stride, inner, outer, left, right, D, DV,
            False, HAS_LEFT, HAS_RIGHT, HAS_CAP, PADDED, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        acc, total, top = attend(
            acc, total, top, x, k, v, end, high, stand, k_len, k_stride, v_stride, inner, outer, left, right, D, DV,
            True, HAS_LEFT, HAS_RIGHT, HAS_CAP, PADDED, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        blind = (total == 0.0) | (top == -INFINITY)
        total = tl.where(blind, 1.0, total)
        row = m0 + tl.arange(0, BLOCK_M)
        at = stats + head * T + first + row
        tl.store(at, tl.where(blind, 0.0, top), mask=row < q_len)
        # +inf for a row without keys: the backward's 2^(... - inf) is then 0
        tl.store(at + tl.cast(heads, tl.int64) * T, tl.where(blind, INFINITY, tl.log2(total)), mask=row < q_len)
        acc = acc * (1.0 / total)[:, None]
        DV_all = heads * DV
        store_rows(out + first.to(tl.int64) * DV_all + head * DV, DV_all, acc, m0, q_len, DV, BLOCK_M, BLOCK_DV)
