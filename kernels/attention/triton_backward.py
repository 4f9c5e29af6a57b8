"""Packed attention, backward, in three Triton kernels: row sums of dout out, then dk and dv, then dq.

What: gradients from the saved row statistics, probabilities recomputed block by block. Replaces: the backward of SDPA per
document, and recomputed plain maths for softcap and sinks. Why faster: no score reaches memory; blocks out of sight are
skipped, and only blocks on an edge of the mask are masked.
A program owns its block of keys (over all query heads that share them) or of queries, so there are no atomics and one
order of the sums: results repeat bitwise. Tested in the interpreter, compiled ahead of time; not timed on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from longtrace.kernels.attention.triton_forward import (
    SIZES,
    capped,
    dot,
    key_blocks,
    locate,
    product,
    rows_of,
    seen,
    store_rows,
)
from longtrace.kernels.head.triton_rows import rounded


@triton.jit(do_not_specialize=["T", "heads", "DV", "d_stride", "d_head"])
def delta_kernel(
    out, d_out, delta, T, heads, DV, d_stride, d_head, PADDED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DV: tl.constexpr
):
    """What: sum over a row of dout out. Replaces: a product and a sum in fp32 copies. Why: one read."""
    head = tl.program_id(1).to(tl.int64)
    m0 = tl.program_id(0) * BLOCK
    DV, d_stride, d_head = DV // 8 * 8, d_stride // 8 * 8, d_head // 8 * 8
    x = rows_of(out + head * DV, heads * DV, m0, T, DV, BLOCK, BLOCK_DV, True, PADDED).to(tl.float32)
    y = rows_of(d_out + head * d_head, d_stride, m0, T, DV, BLOCK, BLOCK_DV, True, PADDED).to(tl.float32)
    row = m0 + tl.arange(0, BLOCK)
    tl.store(delta + head * T + row, tl.sum(x * y, 1), mask=row < T)


@triton.jit
def query_blocks(
    n0, q_len, k_len, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(first query, end, where full blocks begin, where they end) for the keys from n0 on; see `key_blocks`."""
    stand = n0 - (k_len - q_len)
    last = tl.minimum(n0 + BLOCK_N, k_len) - 1 - (k_len - q_len)
    low, high, inside, outside = 0, q_len, 0, q_len
    if HAS_RIGHT:
        low = tl.maximum(stand - right, 0)
        inside = tl.maximum(last - right - low, 0)
    if HAS_LEFT:
        high = tl.minimum(last + left + 1, q_len)
        outside = tl.minimum(stand + left + 1, q_len)
    high = tl.maximum(high, low)
    begin = tl.minimum(low + (inside + BLOCK_M - 1) // BLOCK_M * BLOCK_M, high)
    end = tl.maximum(begin, low + tl.maximum(outside - low, 0) // BLOCK_M * BLOCK_M)
    return low, high, begin, end


@triton.jit
def add_dk_dv(
    dk, dv, keys, values, q, d_out, tops, log_sums, delta, begin, end, stand, q_len, q_stride, d_stride, inner, outer, left, right,
    D, DV, EDGE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_CAP: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """(dk, dv) + what the queries begin..end of one head add; `stand` is the query at the first key's place."""
    row, col = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    for m0 in range(begin, end, BLOCK_M):
        x = rows_of(q, q_stride, m0, q_len, D, BLOCK_M, BLOCK_D, EDGE, PADDED)
        z = capped(product(keys, tl.trans(x), BLOCK_N, BLOCK_M), inner, HAS_CAP)
        if EDGE:
            there = m0 + col < q_len
            top = tl.load(tops + m0 + col, mask=there, other=0.0)
            log_sum = tl.load(log_sums + m0 + col, mask=there, other=float("inf"))  # no query: p = 0
            part = tl.load(delta + m0 + col, mask=there, other=0.0)
        else:
            top, log_sum, part = tl.load(tops + m0 + col), tl.load(log_sums + m0 + col), tl.load(delta + m0 + col)
        p = tl.exp2((z - top[None, :]) * outer - log_sum[None, :])
        if EDGE:
            p = tl.where(seen((stand + row)[:, None] - (m0 + col)[None, :], left, right, HAS_LEFT, HAS_RIGHT), p, 0.0)
        up = rows_of(d_out, d_stride, m0, q_len, DV, BLOCK_M, BLOCK_DV, EDGE, PADDED)
        dv = dot(rounded(p, q.dtype.element_ty), up, dv)
        ds = p * (product(values, tl.trans(up), BLOCK_N, BLOCK_M) - part[None, :])
        if HAS_CAP:
            ds *= 1.0 - z * z
        dk = dot(rounded(ds, q.dtype.element_ty), x, dk)
    return dk, dv


@triton.jit(do_not_specialize=[*SIZES, "d_stride", "d_head"])
def dk_dv_kernel(
    q, k, v, d_out, stats, delta, offsets_q, offsets_k, dk, dv,
    documents, steps, T, heads, group, D, DV, q_stride, q_head, k_stride, k_head, v_stride, v_head, d_stride, d_head,
    inner, outer, scale, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_CAP: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """What: dk and dv of a block of keys of one key head. Replaces: three products and a softmax backward.
    Why: the group's query heads are walked here in order, so grouped gradients need no second sum.
    """
    kv_head = tl.program_id(1).to(tl.int64)
    i, first_k, k_len, block = locate(offsets_k, tl.program_id(0), documents, steps, BLOCK_N)
    n0 = block * BLOCK_N
    if n0 < k_len:
        first = tl.load(offsets_q + i)
        q_len = tl.load(offsets_q + i + 1) - first
        q_stride, k_stride, v_stride, d_stride = (
            q_stride // 8 * 8, k_stride // 8 * 8, v_stride // 8 * 8, d_stride // 8 * 8
        )  # fmt: skip
        q_head, k_head, v_head, d_head = q_head // 8 * 8, k_head // 8 * 8, v_head // 8 * 8, d_head // 8 * 8
        D, DV = D // 8 * 8, DV // 8 * 8
        k += first_k.to(tl.int64) * k_stride + kv_head * k_head
        v += first_k.to(tl.int64) * v_stride + kv_head * v_head
        keys = rows_of(k, k_stride, n0, k_len, D, BLOCK_N, BLOCK_D, True, PADDED)
        values = rows_of(v, v_stride, n0, k_len, DV, BLOCK_N, BLOCK_DV, True, PADDED)
        dk_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv_sum = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
        low, high, begin, end = query_blocks(n0, q_len, k_len, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N)
        stand = n0 - (k_len - q_len)
        for member in range(0, group):
            head = kv_head * group + member
            qs = q + first.to(tl.int64) * q_stride + head * q_head
            ups = d_out + first.to(tl.int64) * d_stride + head * d_head
            tops, parts = stats + head * T + first, delta + head * T + first
            log_sums = tops + tl.cast(heads, tl.int64) * T
            if HAS_RIGHT:
                dk_sum, dv_sum = add_dk_dv(
                    dk_sum, dv_sum, keys, values, qs, ups, tops, log_sums, parts, low, begin, stand, q_len, q_stride, d_stride,
                    inner, outer, left, right, D, DV, True, HAS_LEFT, HAS_RIGHT, HAS_CAP, PADDED,
                    BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
                )  # fmt: skip
            dk_sum, dv_sum = add_dk_dv(
                dk_sum, dv_sum, keys, values, qs, ups, tops, log_sums, parts, begin, end, stand, q_len, q_stride, d_stride,
                inner, outer, left, right, D, DV, False, HAS_LEFT, HAS_RIGHT, HAS_CAP, PADDED,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
            dk_sum, dv_sum = add_dk_dv(
                dk_sum, dv_sum, keys, values, qs, ups, tops, log_sums, parts, end, high, stand, q_len, q_stride, d_stride,
                inner, outer, left, right, D, DV, True, HAS_LEFT, HAS_RIGHT, HAS_CAP, PADDED,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
        kv_heads = heads // group
        dk += first_k.to(tl.int64) * kv_heads * D + kv_head * D
        dv += first_k.to(tl.int64) * kv_heads * DV + kv_head * DV
        store_rows(dk, kv_heads * D, dk_sum * scale, n0, k_len, D, BLOCK_N, BLOCK_D)
        store_rows(dv, kv_heads * DV, dv_sum, n0, k_len, DV, BLOCK_N, BLOCK_DV)


@triton.jit
def add_dq(
    dq, x, up, top, log_sum, part, k, v, begin, end, stand, k_len, k_stride, v_stride, inner, outer, left, right, D, DV,
    EDGE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_CAP: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dq + what the keys begin..end add; `stand` is the key at the first query's place."""
    row, col = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    for n0 in range(begin, end, BLOCK_N):
        keys = rows_of(k, k_stride, n0, k_len, D, BLOCK_N, BLOCK_D, EDGE, PADDED)
        z = capped(product(x, tl.trans(keys), BLOCK_M, BLOCK_N), inner, HAS_CAP)
        p = tl.exp2((z - top[:, None]) * outer - log_sum[:, None])
        if EDGE:
            see = (n0 + col < k_len)[None, :]
            see = see & seen((n0 + col)[None, :] - (stand + row)[:, None], left, right, HAS_LEFT, HAS_RIGHT)
            p = tl.where(see, p, 0.0)
        values = rows_of(v, v_stride, n0, k_len, DV, BLOCK_N, BLOCK_DV, EDGE, PADDED)
        ds = p * (product(up, tl.trans(values), BLOCK_M, BLOCK_N) - part[:, None])
        if HAS_CAP:
            ds *= 1.0 - z * z
        dq = dot(rounded(ds, k.dtype.element_ty), keys, dq)
    return dq


@triton.jit(do_not_specialize=[*SIZES, "d_stride", "d_head"])
def dq_kernel(
    q, k, v, d_out, stats, delta, offsets_q, offsets_k, dq,
    documents, steps, T, heads, group, D, DV, q_stride, q_head, k_stride, k_head, v_stride, v_head, d_stride, d_head,
    inner, outer, scale, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_CAP: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """What: dq of a block of queries of one head. Replaces: two products and a softmax backward.
    Why: a kernel of its own costs two products more than adding into dq from dk_dv_kernel, and needs no atomics.
    """
    head = tl.program_id(1).to(tl.int64)
    i, first, q_len, block = locate(offsets_q, tl.program_id(0), documents, steps, BLOCK_M)
    blocks = (q_len + BLOCK_M - 1) // BLOCK_M
    if block < blocks:
        m0 = (blocks - 1 - block) * BLOCK_M
        first_k = tl.load(offsets_k + i)
        k_len = tl.load(offsets_k + i + 1) - first_k
        q_stride, k_stride, v_stride, d_stride = (
            q_stride // 8 * 8, k_stride // 8 * 8, v_stride // 8 * 8, d_stride // 8 * 8
        )  # fmt: skip
        q_head, k_head, v_head, d_head = q_head // 8 * 8, k_head // 8 * 8, v_head // 8 * 8, d_head // 8 * 8
        D, DV = D // 8 * 8, DV // 8 * 8
        q += first.to(tl.int64) * q_stride + head * q_head
        d_out += first.to(tl.int64) * d_stride + head * d_head
        k += first_k.to(tl.int64) * k_stride + head // group * k_head
        v += first_k.to(tl.int64) * v_stride + head // group * v_head
        x = rows_of(q, q_stride, m0, q_len, D, BLOCK_M, BLOCK_D, True, PADDED)
        up = rows_of(d_out, d_stride, m0, q_len, DV, BLOCK_M, BLOCK_DV, True, PADDED)
        row = m0 + tl.arange(0, BLOCK_M)
        at = stats + head * T + first + row
        top = tl.load(at, mask=row < q_len, other=0.0)
        log_sum = tl.load(at + tl.cast(heads, tl.int64) * T, mask=row < q_len, other=float("inf"))
        part = tl.load(delta + head * T + first + row, mask=row < q_len, other=0.0)
        total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        low, high, begin, end = key_blocks(m0, q_len, k_len, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N)
        stand = m0 + k_len - q_len
        if HAS_LEFT:
            total = add_dq(
                total, x, up, top, log_sum, part, k, v, low, begin, stand, k_len, k_stride, v_stride, inner, outer, left, right,
                D, DV, True, HAS_LEFT, HAS_RIGHT, HAS_CAP, PADDED, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
        total = add_dq(
            total, x, up, top, log_sum, part, k, v, begin, end, stand, k_len, k_stride, v_stride, inner, outer, left, right,
            D, DV, False, HAS_LEFT, HAS_RIGHT, HAS_CAP, PADDED, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        total = add_dq(
            total, x, up, top, log_sum, part, k, v, end, high, stand, k_len, k_stride, v_stride, inner, outer, left, right,
            D, DV, True, HAS_LEFT, HAS_RIGHT, HAS_CAP, PADDED, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        dq += first.to(tl.int64) * heads * D + head * D
        store_rows(dq, heads * D, total * scale, m0, q_len, D, BLOCK_M, BLOCK_D)
