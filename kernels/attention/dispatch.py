"""`varlen_attention`: causal attention over packed documents, by the best kernel this machine has."""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from longtrace.kernels import backend, extension
from longtrace.kernels.attention import documents, tile
from longtrace.kernels.backend import Candidate, Choice

MAX_WIDTH = 256  # of a head


@lru_cache(maxsize=1)
def _flash_attn():
    """flash-attn's varlen function, or why it is not here."""
    try:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func, f"flash-attn {version('flash-attn')}"
    except (ImportError, PackageNotFoundError, OSError) as error:
        return None, f"flash-attn: {error}"


@lru_cache(maxsize=1)
def _flash_attn_3():
    """flash-attn 3's varlen function (Hopper), or why it cannot be used."""
    return _for_capability("flash_attn_interface", "flash-attn 3", (9,))


@lru_cache(maxsize=1)
def _flash_attn_4():
    """flash-attn 4's varlen function (Hopper and datacenter Blackwell), or why it cannot be used."""
    return _for_capability("flash_attn.cute", "flash-attn 4", (9, 10))


def _for_capability(module: str, name: str, majors: tuple[int, ...]):
    major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() and not torch.version.hip else 0
    if major not in majors:
        return None, f"{name}: not for this device"
    try:
        return importlib.import_module(module).flash_attn_varlen_func, name
    except Exception as error:  # its build for another torch or CUDA fails in many ways
        return None, f"{name}: {error}"


@lru_cache(maxsize=1)
def _triton():
    """Our Triton kernels' varlen function, or why it is not here."""
    try:
        from longtrace.kernels.attention.cuda import varlen_attention as function
    except ImportError as error:
        return None, f"triton: {error}"
    return function, "our Triton kernels"


@lru_cache(maxsize=1)
def _torch_varlen():
    """torch's varlen function, or why it cannot be used."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        return None, f"torch varlen_attn: {error}"
    parameters = inspect.signature(varlen_attn).parameters
    missing = [name for name in ("scale", "window_size", "enable_gqa") if name not in parameters]
    if missing:
        return None, f"torch {torch.__version__} varlen_attn has no {', '.join(missing)}"
    return varlen_attn, f"torch {torch.__version__} varlen_attn"


def choose(
    device: str,
    dtype: torch.dtype,
    softcap: bool = False,
    sinks: bool = False,
    window: bool = False,
    widths: tuple[int, int] = (64, 64),
) -> Choice:
    """What serves tensors on `device`; `window`: one is set; `widths`: the head dims of keys and values.

    By name: "tiles" (our C++ on the CPU), "flash_attn_4", "flash_attn_3", "flash_attn", "torch_varlen", "triton" (ours) or
    "documents" (SDPA per document).
    """
    return backend.choose("varlen_attention", _candidates, device, dtype, softcap, sinks, window, widths)


def _candidates(device: str, dtype, softcap: bool, sinks: bool, window: bool, widths) -> Iterator[Candidate]:
    if device == "cpu":
        lacks = "" if dtype in tile.DTYPES else f"the tiles take bf16, fp16 and fp32, this is {dtype}"
        lacks = lacks if extension.LOADED else extension.WHY
        why = "" if lacks else f"C++ {torch.ops.longtrace.cpu_capability()}, same bits for any number of threads"
        yield Candidate("cpu", "tiles", lacks or why, not lacks)
    if device == "cuda":
        yield from _libraries(dtype, softcap, sinks, window, *widths)
        yield _ours(device, dtype)
    yield Candidate("reference", "documents", f"{'plain maths' if softcap or sinks else 'SDPA'} per document")
    if device != "cuda":
        yield _ours(device, dtype)


def _libraries(dtype, softcap: bool, sinks: bool, window: bool, D: int, DV: int) -> Iterator[Candidate]:
    """The packed kernels of flash-attn and torch."""
    lacks = ""
    if dtype not in (torch.bfloat16, torch.float16):
        lacks = f"the libraries' kernels take bf16 and fp16, this is {dtype}"
    elif sinks:
        lacks = "the libraries' packed kernels are not used with attention sinks"
    elif D != DV or D % 8:
        lacks = f"the libraries' kernels take equal head dims, multiples of 8, not {D} and {DV}"
    if lacks:
        yield Candidate("cuda", "libraries", lacks, False)
        return
    known = not (softcap or window) and D <= 128  # what its backward is known to serve
    yield _library("flash_attn_4", _flash_attn_4(), "" if known else "flash-attn 4: plain attention up to 128 wide")
    yield _library("flash_attn_3", _flash_attn_3())
    yield _library("flash_attn", _flash_attn())
    yield _library("torch_varlen", _torch_varlen(), "torch's packed kernel takes no softcap" if softcap else "")


def _library(name: str, found: tuple, lacks: str = "") -> Candidate:
    function, why = found
    return Candidate("cuda", name, why if function is None else lacks or why, function is not None and not lacks)


def _ours(device: str, dtype: torch.dtype) -> Candidate:
    function, why = _triton()
    lacks = why if function is None else backend.triton_lacks(device)
    if dtype not in tile.DTYPES:
        lacks = f"our kernels take bf16, fp16 and fp32, this is {dtype}"
    return Candidate("triton", "triton", lacks or why, not lacks)


def _starts(name: str, cu_seqlens: Tensor, total: int) -> list[int]:
    """`cu_seqlens` as integers, checked."""
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != total:
        raise ValueError(f"{name} must run from 0 to {total} (the packed length), got {starts[0]} to {starts[-1]}")
    for i, (a, b) in enumerate(itertools.pairwise(starts)):
        if b < a:
            raise ValueError(f"{name} must not decrease: {name}[{i}] = {a}, {name}[{i + 1}] = {b}")
    return starts


@torch.compiler.disable
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention within each document of a packed row; documents do not see each other.

    Args:
        q: (T, heads, D); k: (Tk, kv_heads, D); v: (Tk, kv_heads, Dv); bf16, fp16, fp32 or fp64, heads a multiple of
            kv_heads (query head h reads kv head h // (heads / kv_heads)); D and Dv up to 256.
        cu_seqlens: (documents + 1,) int32 or int64, from 0 to T, not decreasing; empty documents are allowed.
        max_seqlen: the longest document, in tokens (read by CUDA kernels only).
        cu_seqlens_k, max_seqlen_k: the same for keys; default: the queries'.
        causal: a query sees keys up to its own; the last query is aligned with the last key (flash-attn's convention).
        scale: of the scores, default D ** -0.5. window: (left, right) keys visible on each side of a query's own,
            inclusive, -1 for open (flash-attn's convention). softcap: scores become softcap * tanh(scores / softcap).
        sinks: (heads,) logits that join each softmax and carry no value (gpt-oss).

    Returns: (T, heads, Dv) in q's dtype. A query that sees no key reads 0.
    Raises: ValueError for shapes, dtypes or offsets that do not fit. On CUDA the offsets' values are not read back
        (it would stall the device at every layer); their shape and dtype are checked.
    """
    if q.ndim != 3 or k.ndim != 3 or v.ndim != 3:
        raise ValueError(
            f"q, k, v must be (tokens, heads, D), got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
    if max(q.shape[2], v.shape[2]) > MAX_WIDTH or not min(q.shape[2], v.shape[2]):
        raise ValueError(f"head_dim {q.shape[2]} (values: {v.shape[2]}); accepted: 1 to {MAX_WIDTH}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; accepted: one dtype")
    for name, offsets in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        if offsets is not None and (
            offsets.ndim != 1 or not offsets.numel() or offsets.dtype not in (torch.int32, torch.int64)
        ):
            raise ValueError(
                f"{name} must be (documents + 1,) int32 or int64, got {tuple(offsets.shape)} {offsets.dtype}"
            )
    if cu_seqlens_k is None:
        cu_seqlens_k, max_seqlen_k = cu_seqlens, max_seqlen
    if cu_seqlens_k.shape != cu_seqlens.shape:
        raise ValueError(f"{cu_seqlens.numel() - 1} documents of queries, {cu_seqlens_k.numel() - 1} of keys")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks has shape {tuple(sinks.shape)}, expected ({q.shape[1]},)")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0 or None, got {softcap}")
    window = (-1, -1) if window is None else (int(window[0]), int(window[1]))
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    name = choose(
        q.device.type, q.dtype, softcap is not None, sinks is not None, window != (-1, -1), (q.shape[2], v.shape[2])
    ).name
    if name in ("documents", "tiles") or not q.shape[0] or not k.shape[0]:
        starts_q = _starts("cu_seqlens", cu_seqlens, q.shape[0])
        starts_k = starts_q if cu_seqlens_k is cu_seqlens else _starts("cu_seqlens_k", cu_seqlens_k, k.shape[0])
        serve = tile if name == "tiles" else documents
        return serve.varlen_attention(q, k, v, starts_q, starts_k, causal, scale, window, softcap, sinks)
    if max_seqlen_k is None:
        raise ValueError("max_seqlen_k is needed with cu_seqlens_k")
    offsets_q, offsets_k = (x.to(device=q.device, dtype=torch.int32) for x in (cu_seqlens, cu_seqlens_k))
    if name == "triton":
        return _triton()[0](q, k, v, offsets_q, offsets_k, causal, scale, window, softcap, sinks)
    if name == "flash_attn_4":
        return _flash_4(q, k, v, offsets_q, offsets_k, int(max_seqlen), int(max_seqlen_k), scale, causal)
    if name in ("flash_attn", "flash_attn_3"):
        function = (_flash_attn if name == "flash_attn" else _flash_attn_3)()[0]
        out = function(
            q, k, v, offsets_q, offsets_k, int(max_seqlen), int(max_seqlen_k),
            softmax_scale=scale, causal=causal, window_size=window, softcap=softcap or 0.0,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out  # early builds of flash-attn 3 return the lse too
    return _torch_varlen()[0](
        q, k, v, offsets_q, offsets_k, int(max_seqlen), int(max_seqlen_k),
        scale=scale, window_size=(window[0], 0) if causal else window, enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip


def _flash_4(q, k, v, offsets_q, offsets_k, max_q: int, max_k: int, scale: float, causal: bool) -> Tensor:
    """flash-attn 4 by keywords: its order of arguments, and whether it takes the lengths, differ between releases."""
    function = _flash_attn_4()[0]
    optional = {
        "max_seqlen_q": max_q,
        "max_seqlen_k": max_k,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    known = inspect.signature(function).parameters
    out = function(
        q, k, v, cu_seqlens_q=offsets_q, cu_seqlens_k=offsets_k, softmax_scale=scale, causal=causal,
        **{name: value for name, value in optional.items() if name in known},
    )  # fmt: skip
    return out[0] if isinstance(out, tuple) else out
