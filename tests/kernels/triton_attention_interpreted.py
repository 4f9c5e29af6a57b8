"""Cases of the Triton attention kernels that run in the interpreter; `test_attention_triton.py` starts this file.

`python triton_attention_interpreted.py GROUP`, see triton_cases.py. The interpreter pays by the program and the block, so
shapes are small and blocks are 16 or 32 wide; the group "shipped" runs the shipped sizes.
"""

from __future__ import annotations

import zlib

import torch
from triton_cases import FAR, case, far_rows, note_error, run_group

from longtrace.kernels.attention import reference


def blocks(block_m: int, block_n: int) -> None:
    """Small blocks for every kernel, so that short documents have several."""
    from longtrace.kernels.attention import cuda

    for key in cuda.SIZES:
        cuda.SIZES[key] = {"any": {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 1}}


def offsets(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def make(lengths, lengths_k, heads, kv_heads, D, DV, dtype, seed):
    """q, k, v, sinks as leaves, and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    T, Tk = sum(lengths), sum(lengths_k)
    q, k, v, sinks = draw(T, heads, D), draw(Tk, kv_heads, D), draw(Tk, kv_heads, DV), draw(heads)
    return [x.requires_grad_() for x in (q, k, v, sinks)], draw(T, heads, DV)


def ours(inputs, up, lengths, lengths_k, options):
    """(out, dq, dk, dv[, dsinks]) of the Triton kernels."""
    from longtrace.kernels.attention import cuda

    options = dict(options)
    used = inputs if options.pop("sinks", False) else inputs[:3]
    out = cuda.varlen_attention(
        *inputs[:3], offsets(lengths), offsets(lengths_k), options.get("causal", True),
        options.get("scale", inputs[0].shape[2] ** -0.5), options.get("window", (-1, -1)), options.get("softcap"),
        used[3] if len(used) > 3 else None,
    )  # fmt: skip
    return [out.detach(), *torch.autograd.grad(out, used, up)]


def plain(inputs, up, lengths, lengths_k, options, dtype):
    """The same by the reference in `dtype`."""
    options = dict(options)
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    used = inputs if options.pop("sinks", False) else inputs[:3]
    sinks = used[3] if len(used) > 3 else None
    out = reference.varlen_attention(
        *inputs[:3], offsets(lengths), cu_seqlens_k=offsets(lengths_k), sinks=sinks, **options
    )
    return [out.detach(), *torch.autograd.grad(out, used, up.to(dtype))]


NAMES = ("out", "dq", "dk", "dv", "dsinks")
KERNELS = dict(zip(NAMES, ("forward", "dq", "dk_dv", "dk_dv", "delta")))


def check(lengths, options, lengths_k=None, heads=2, kv_heads=1, D=64, DV=None, dtype=torch.float32, seed=None):
    """Values and gradients: |ours - exact| <= |theirs - exact| in the Frobenius norm, up to the scatter of roundings."""
    lengths_k, DV = lengths_k or lengths, DV or D
    seed = zlib.crc32(repr((lengths, lengths_k, heads, kv_heads, D, DV, options)).encode()) if seed is None else seed
    print(f"seed {seed}: {lengths} {lengths_k} {heads}/{kv_heads} heads, {D} {DV}, {dtype}, {options}")
    inputs, up = make(lengths, lengths_k, heads, kv_heads, D, DV, dtype, seed)
    got = ours(inputs, up, lengths, lengths_k, options)
    exact = plain(inputs, up, lengths, lengths_k, options, torch.float64)
    theirs = plain(inputs, up, lengths, lengths_k, options, dtype)
    for name, a, b, c in zip(NAMES, got, exact, theirs):
        assert a.dtype == dtype and a.shape == b.shape, name
        # the rounding of a sum of n terms in another order scatters by chance: fewer numbers, more scatter
        unit = torch.finfo(dtype).eps / 2
        chance = unit * b.norm().item() * min(1.0, 32 / max(b.numel(), 1) ** 0.5)
        error, allowed = (a.double() - b).norm().item(), (c.double() - b).norm().item()
        note_error(f"attention {KERNELS[name]}", dtype, error, b.norm().item(), allowed)
        # dq of a query with one key is a difference of two equal fp32 sums: 2e-7 is their rounding, per value
        assert error <= allowed + chance + 2e-7 * a.numel() ** 0.5, (
            f"{name} (seed {seed}): {error} > {allowed} + {chance}"
        )
    return got


def same_bits(a, b):
    return all(torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)) for x, y in zip(a, b))


EVERYTHING = {"window": (9, 0), "softcap": 2.0, "sinks": True}
OPTIONS = {
    "causal": {},
    "full": {"causal": False},
    "narrow window": {"window": (3, 0)},
    "window of one key": {"window": (0, 0)},
    "window of two keys": {"window": (1, 0)},  # the last query that sees a block of keys is alone in its block
    "both sides": {"window": (20, 5), "causal": False},
    "right only": {"window": (-1, 2), "causal": False},
    "wide window": {"window": (1000, 1000), "causal": False},
    "softcap": {"softcap": 2.0, "scale": 0.3},
    "sinks": {"sinks": True},
    "everything": EVERYTHING,
}
ODD = [0, 1, 33, 0, 18]


@case("options", *((name,) for name in OPTIONS))
def option(name):
    blocks(16, 16)
    check(ODD, OPTIONS[name], heads=1, D=16)


@case("options", *((name,) for name in ("causal", "full", "both sides", "everything")))
def more_keys_than_queries(name):
    blocks(16, 16)
    check([5, 17, 1], OPTIONS[name], [40, 18, 3], heads=1, D=16)


@case("options", *((name,) for name in ("causal", "narrow window", "both sides", "everything")))
def blind_queries(name):
    """Fewer keys than queries: the first queries see none, read 0 and pass no gradient."""
    blocks(16, 16)
    lengths, lengths_k = [40, 19], [7, 18]
    got = check(lengths, OPTIONS[name], lengths_k, heads=1, D=16)
    blind = ~torch.cat(
        [
            reference.visible(n, m, OPTIONS[name].get("causal", True), OPTIONS[name].get("window")).any(1)
            for n, m in zip(lengths, lengths_k)
        ]
    )
    assert blind.any() and not got[0][blind].any() and not got[1][blind].any()


@case("options", ({},), (EVERYTHING,))
def documents_without_keys_or_queries(options):
    blocks(16, 16)
    options = options | {"window": (-1, -1)}
    inputs, up = make([3, 4, 0], [0, 4, 5], 2, 1, 16, 16, torch.float32, 5)
    got = ours(inputs, up, [3, 4, 0], [0, 4, 5], options)
    assert not got[0][:3].any() and not got[1][:3].any() and not got[2][4:].any() and not got[3][4:].any()
    alone = [x.detach()[3:7].requires_grad_() for x in inputs[:1]]
    alone += [x.detach()[:4].requires_grad_() for x in inputs[1:3]] + [inputs[3]]
    assert same_bits([x[s] for x, s in zip(got, (slice(3, 7), slice(3, 7), slice(4), slice(4)))],
                     ours(alone, up[3:7], [4], [4], options)[:4])  # fmt: skip


SHAPES = (
    (2, 2, 64, 64),
    (3, 1, 96, 96),
    (8, 1, 16, 128),
    (3, 1, 128, 64),
    (1, 1, 256, 256),
    (2, 2, 20, 5),
)  # heads, D, Dv


@case("shapes", *((s, torch.bfloat16) for s in SHAPES), (SHAPES[0], torch.float16), (SHAPES[0], torch.float32))
@case("more", *((s, d) for s in SHAPES[1:] for d in (torch.float16, torch.float32)))
def shape_and_dtype(shape, dtype):
    blocks(32, 32)
    heads, kv_heads, D, DV = shape
    check([35, 2], EVERYTHING | {"window": (33, 0)}, None, heads, kv_heads, D, DV, dtype)


@case("shapes", (torch.float16,), (torch.bfloat16,))
def plain_causal(dtype):
    blocks(32, 32)
    check([66], {}, D=64, dtype=dtype)


@case("shapes")
def strides():
    """Slices of a fused projection, transposed heads, odd offsets and expanded gradients give the same bits.

    Values are wider than keys, or one's stride could pass for the other's.
    """
    blocks(16, 16)
    (q, k, v, sinks), up = make([20], [20], 2, 1, 16, 24, torch.float32, 3)
    fused = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], 1).detach()
    widths = (16, 16, 24)
    parts = [x.unflatten(1, (-1, n)).requires_grad_() for x, n in zip(fused.split([32, 16, 24], 1), widths)]
    turned = [x.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_() for x in (q, k, v)]
    odd = [torch.zeros(x.numel() + 1)[1:].view_as(x).copy_(x.detach()).requires_grad_() for x in (q, k, v)]
    exact = ours([q, k, v, sinks], up, [20], [20], {})
    for inputs in (parts, turned, odd):
        assert same_bits(ours([*inputs, sinks], up.transpose(0, 1).contiguous().transpose(0, 1), [20], [20], {}), exact)
    one = torch.ones(()).expand(20, 2, 24)
    assert same_bits(
        ours([q, k, v, sinks], one, [20], [20], {}), ours([q, k, v, sinks], one.contiguous(), [20], [20], {})
    )


@case("shapes", (EVERYTHING,), ({"causal": False},))
def repeats_and_packs_alike(options):
    """Bitwise: on repeat, and for a document alone and in a pack."""
    blocks(16, 16)
    lengths, lengths_k = [3, 18, 17, 1], [5, 18, 20, 1]
    inputs, up = make(lengths, lengths_k, 2, 1, 16, 16, torch.bfloat16, 11)
    got = ours(inputs, up, lengths, lengths_k, options)
    assert same_bits(got, ours(inputs, up, lengths, lengths_k, options))
    for i in (1, 2):
        rows = slice(sum(lengths[:i]), sum(lengths[: i + 1]))
        keys = slice(sum(lengths_k[:i]), sum(lengths_k[: i + 1]))
        q, k, v = (x.detach()[s].requires_grad_() for x, s in zip(inputs, (rows, keys, keys)))
        alone = ours([q, k, v, inputs[3]], up[rows], [lengths[i]], [lengths_k[i]], options)
        assert same_bits([x[s] for x, s in zip(got, (rows, rows, keys, keys))], alone[:4])


def far(x, stride):
    """x (T, heads, D) with tokens `stride` elements apart; heads are, if it is negative."""
    x = x.detach()
    if stride > 0:
        return far_rows(x.flatten(1), stride).unflatten(1, x.shape[1:])
    return far_rows(x.transpose(0, 1).flatten(1), -stride).unflatten(1, (-1, x.shape[2])).transpose(0, 1)


SPREAD = {  # lengths, elements between tokens (minus: between heads), rows of a block
    "tokens": ([150], FAR // 144 // 8 * 8, 16),  # the first of the last block is past 2^31; within a block offsets fit
    "documents": ([145, 2], FAR // 144 // 8 * 8, 16),
    "heads": ([3], -FAR // 2, 16),
    "the widest block": ([128], 2**24 - 8, 128),
    "tokens of one block": ([18], FAR // 15 // 8 * 8, 16),
}


@case("shapes", *((name,) for name in SPREAD))
def offsets_past_32_bits(name):
    """Tokens of a document or a block, documents and heads 2.3e9 elements apart give the bits of those side by side."""
    lengths, stride, block = SPREAD[name]
    heads = 3 if stride < 0 else 1
    blocks(block, block)
    (q, k, v, sinks), up = make(lengths, lengths, heads, heads, 16, 16, torch.bfloat16, 23)
    options = {"window": (20, 0)}
    exact = ours([q, k, v, sinks], up, lengths, lengths, options)
    spread = [far(x, stride).requires_grad_() for x in (q, k, v)]
    assert same_bits(ours([*spread, sinks], far(up, stride), lengths, lengths, options), exact)


@case("shapes", (torch.float32,), (torch.bfloat16,))
def row_sums(dtype):
    """delta_kernel by itself: its result reaches the gradients only mixed with others'."""
    from longtrace.kernels.attention import cuda
    from longtrace.kernels.head.triton_rows import launch

    (q, *_), up = make([37], [37], 2, 1, 24, 24, dtype, 29)
    out, delta = q.detach(), torch.empty(2, 37)
    launch(
        cuda.delta_kernel, (3, 2), out, up, delta, 37, 2, 24, *up.stride()[:2], True, BLOCK_DV=32, **cuda.DELTA
    )  # fmt: skip
    exact, theirs = ((out.to(d) * up.to(d)).sum(2).T for d in (torch.float64, torch.float32))
    error, allowed = ((x.double() - exact).norm().item() for x in (delta, theirs))
    note_error("attention delta", torch.float32, error, exact.norm().item(), allowed)
    assert error <= allowed + 1e-7 * exact.norm().item()


@case("shapes", (1e4,), (-1e4,))
def an_offset_of_all_scores_changes_nothing(offset):
    """The first place of q and k adds the offset to each score, exactly; values and the gradients of v stay bitwise."""
    blocks(16, 16)
    (q, k, v, sinks), up = make([20], [20], 1, 1, 16, 16, torch.float32, 7)
    q, k = ((x.detach() * 8).round() / 8 for x in (q, k))  # eighths: products are exact
    q[:, :, 0] = 8.0
    results = []
    for first in (0.0, offset / 8):
        k[:, :, 0] = first
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        results.append(ours([*leaves, sinks], up, [20], [20], {"scale": 1.0}))
    assert same_bits(*([x[i] for i in (0, 3)] for x in results))
    assert same_bits(*([x[2][:, :, 1:]] for x in results))


@case("shapes")
def a_nan_document_stays_alone():
    blocks(16, 16)
    inputs, up = make([18, 5], [18, 5], 2, 1, 16, 16, torch.float32, 13)
    clean = ours(inputs, up, [18, 5], [18, 5], {})
    broken = [x.detach().clone() for x in inputs]
    broken[2][3] = float("nan")
    got = ours([x.requires_grad_() for x in broken], up, [18, 5], [18, 5], {})
    assert same_bits([x[18:] for x in got], [x[18:] for x in clean])
    assert got[0][3:18].isnan().all()


@case("shapes")
def tokens_after_the_last_offset_read_zero():
    blocks(16, 16)
    inputs, up = make([20], [20], 1, 1, 16, 16, torch.float32, 17)
    got = ours(inputs, up, [17], [17], {})
    assert all(not x[17:].any() for x in got) and all(x[:17].any() for x in got)


@case("shapes")
def only_what_is_asked_for():
    blocks(16, 16)
    from longtrace.kernels.attention import cuda

    inputs, up = make([20], [20], 2, 1, 16, 16, torch.float32, 19)
    whole = ours(inputs, up, [20], [20], {})
    for i in range(3):
        some = [x.detach().requires_grad_(i == j) for j, x in enumerate(inputs[:3])]
        out = cuda.varlen_attention(*some, offsets([20]), offsets([20]), True, 0.25, (-1, -1), None, None)
        assert same_bits(torch.autograd.grad(out, some[i], up), whole[i + 1 : i + 2])


@case("shapes")
def refusals():
    from longtrace.kernels.attention import cuda

    cu = offsets([2])
    for x in (torch.zeros(2, 1, 264), torch.zeros(2, 1, 8, dtype=torch.float64)):
        try:
            cuda.varlen_attention(x, x, x, cu, cu, True, 1.0, (-1, -1), None, None)
        except ValueError:
            continue
        raise AssertionError("accepted")
    x = torch.ones(2, 1, 16, requires_grad=True)
    out = cuda.varlen_attention(x, x, x, cu, cu, True, 1.0, (-1, -1), None, None)
    try:
        torch.autograd.grad(out.square().sum(), x, create_graph=True)
    except RuntimeError as error:
        assert "differentiable once" in str(error)
    else:
        raise AssertionError("a second derivative was given")


@case("random", *((seed,) for seed in range(6)))
@case("more", *((seed,) for seed in range(6, 30)))
def random_problem(seed):
    generator = torch.Generator().manual_seed(seed)
    pick = lambda *values: values[int(torch.randint(len(values), (), generator=generator))]  # noqa: E731
    blocks(*pick((16, 16), (32, 16), (16, 32)))
    lengths = [pick(0, 1, 2, 15, 16, 17, 31, 40) for _ in range(pick(1, 2, 4))]
    lengths_k = pick(lengths, [max(1, n + pick(-5, 3, 9)) for n in lengths])
    options = {"causal": pick(True, False), "window": (pick(-1, 0, 3, 17, 64), pick(-1, 0, 5))}
    options |= pick({}, {"softcap": 3.0}, {"sinks": True}, {"scale": -0.2})
    kv_heads = pick(1, 2)
    check(lengths, options, lengths_k, kv_heads * pick(1, 3), kv_heads, pick(8, 24, 64), pick(8, 40), seed=seed)


@case("shipped", *((D, d) for D in (64, 128, 256) for d in (torch.bfloat16, torch.float32)))
def shipped_sizes(D, dtype):
    check([63, 64, 65, 1, 0, 200], EVERYTHING | {"window": (70, 0)}, None, 2, 1, D, D, dtype)
    check([150], {}, None, 2, 2, D, D, dtype)


@case("shipped", *((group,) for group in (1, 3, 8)))
def grouped_heads(group):
    check([130, 7], {}, None, 2 * group, 2, 64, 64, torch.bfloat16)


@case("shipped")
def many_documents():
    lengths = [i % 4 for i in range(90)]
    check(lengths, EVERYTHING, D=64, dtype=torch.bfloat16)


def smallest():
    ours(*make([2], [2], 1, 1, 16, 16, torch.float32, 0), [2], [2], {})


if __name__ == "__main__":
    run_group(smallest, all="ignore")  # exp of -inf and inf - inf are meant, in rows that see nothing
