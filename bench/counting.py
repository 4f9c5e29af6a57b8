"""Counts what a program moves and computes without a GPU: Triton kernels in the interpreter, torch ops as they dispatch.

`interpreted` counts the bytes of unmasked lanes and the FLOPs of dots, launch by launch. `Ledger` writes down every pass
a whole op makes, by the shapes it reads and writes, so that a count at a small shape can be read off at a large one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

# ----------------------------------------------------------------------------------------------------------------------
# Triton kernels


@dataclass
class Traffic:
    """Bytes and FLOPs of launches: `loads` and `stores` of every unmasked lane; `distinct_*` each byte once a launch.

    Distinct bytes are the least that memory has to deliver (compulsory traffic); the rest a cache may serve. Dots count
    2 M N K with the padding of their blocks. An atomic counts as a load and a store.
    """

    launches: int = 0
    loads: int = 0
    stores: int = 0
    distinct_loads: int = 0
    distinct_stores: int = 0
    flops: int = 0

    @property
    def bytes(self) -> int:
        return self.loads + self.stores

    @property
    def distinct(self) -> int:
        return self.distinct_loads + self.distinct_stores

    def add(self, other: Traffic) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class _Launch:
    """One launch while it runs: the totals and the addresses seen."""

    def __init__(self) -> None:
        self.traffic = Traffic(launches=1)
        self.seen: dict[tuple[str, int], list[np.ndarray]] = {}

    def touch(self, kind: str, pointers: Any, mask: Any) -> None:
        addresses = np.asarray(pointers.data)
        if mask is not None:
            addresses = addresses[np.broadcast_to(np.asarray(mask.data, dtype=bool), addresses.shape)]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        setattr(self.traffic, kind, getattr(self.traffic, kind) + addresses.size * size)
        seen = self.seen.setdefault((kind, size), [])
        seen.append(np.unique(addresses))
        if len(seen) == 64:
            seen[:] = [np.unique(np.concatenate(seen))]

    def finish(self) -> Traffic:
        for (kind, size), seen in self.seen.items():
            name = f"distinct_{kind}"
            bytes_here = np.unique(np.concatenate(seen)).size * size
            setattr(self.traffic, name, getattr(self.traffic, name) + bytes_here)
        return self.traffic


@contextmanager
def interpreted(
    on_launch: Callable[[str, dict, Traffic], None] = lambda *_: None,
) -> Iterator[dict[str, Traffic]]:
    """Counts every Triton kernel launched inside the block, by "file.name"; TRITON_INTERPRET=1 before triton's first import.

    `on_launch(kernel, arguments by name, its traffic)` is called after each launch. RuntimeError without the interpreter.
    """
    import triton
    from triton.runtime import interpreter

    if not triton.knobs.runtime.interpret:
        raise RuntimeError(
            "kernels are counted in Triton's interpreter: set TRITON_INTERPRET=1 before importing triton"
        )
    builder, function = interpreter.InterpreterBuilder, interpreter.InterpretedFunction
    saved = {
        (owner, name): getattr(owner, name)
        for owner, names in (
            (builder, ("create_masked_load", "create_masked_store", "create_dot", "create_atomic_rmw",
                       "create_atomic_cas")),
            (function, ("run",)),
        )
        for name in names
    }  # fmt: skip
    counts: dict[str, Traffic] = {}
    now: list[_Launch] = []

    def load(self, pointers, mask, *rest, **more):
        now[-1].touch("loads", pointers, mask)
        return saved[builder, "create_masked_load"](self, pointers, mask, *rest, **more)

    def store(self, pointers, value, mask, *rest, **more):
        now[-1].touch("stores", pointers, mask)
        return saved[builder, "create_masked_store"](self, pointers, value, mask, *rest, **more)

    def dot(self, a, b, *rest, **more):
        *batch, m, k = a.data.shape
        now[-1].traffic.flops += 2 * math.prod(batch) * m * k * b.data.shape[-1]
        return saved[builder, "create_dot"](self, a, b, *rest, **more)

    def read_modify_write(self, op, pointers, value, mask, *rest):
        for kind in ("loads", "stores"):
            now[-1].touch(kind, pointers, mask)
        return saved[builder, "create_atomic_rmw"](self, op, pointers, value, mask, *rest)

    def compare_and_swap(self, pointers, *rest):
        for kind in ("loads", "stores"):
            now[-1].touch(kind, pointers, None)
        return saved[builder, "create_atomic_cas"](self, pointers, *rest)

    def run(self, *args, grid, warmup, **more):
        now.append(_Launch())
        try:
            with _disable_current_modes():
                result = saved[function, "run"](self, *args, grid=grid, warmup=warmup, **more)
        finally:
            traffic = now.pop().finish()
        name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"  # two files may have a kernel of one name
        counts.setdefault(name, Traffic()).add(traffic)
        known = inspect.signature(self.fn).parameters
        bound = inspect.signature(self.fn).bind(*args, **{k: v for k, v in more.items() if k in known})
        bound.apply_defaults()
        on_launch(name, dict(bound.arguments), traffic)
        return result

    replaced = (load, store, dot, read_modify_write, compare_and_swap, run)
    try:
        for (owner, name), new in zip(saved, replaced):
            setattr(owner, name, new)
        yield counts
    finally:
        for (owner, name), old in saved.items():
            setattr(owner, name, old)


# ----------------------------------------------------------------------------------------------------------------------
# Whole ops


class Operand(NamedTuple):
    """What a pass reads or writes: a shape (dims that repeat by stride 0 are 1) and the bytes of an element."""

    shape: tuple[int, ...]
    size: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.size


@dataclass(frozen=True)
class Pass:
    """One trip through memory: a torch op, a library product or a kernel launch. `dims`: 2 prod(dims) FLOPs.

    `blocks`: a kernel's block along each of dims, which is filled up to whole ones.
    """

    name: str
    reads: tuple[Operand, ...] = ()
    writes: tuple[Operand, ...] = ()
    dims: tuple[int, ...] = ()
    double: bool = False  # the product is in fp64
    blocks: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(x.bytes for x in (*self.reads, *self.writes))

    @property
    def flops(self) -> int:
        blocks = self.blocks or (1,) * len(self.dims)
        return 2 * math.prod(-(-d // b) * b for d, b in zip(self.dims, blocks)) if self.dims else 0

    def at(self, sizes: Mapping[int, int]) -> Pass:
        """The same pass with every dimension d replaced by sizes[d]. KeyError for a dimension without an entry."""
        reads, writes = (
            tuple(Operand(tuple(sizes[d] for d in x.shape), x.size) for x in part) for part in (self.reads, self.writes)
        )
        return replace(self, reads=reads, writes=writes, dims=tuple(sizes[d] for d in self.dims))


def operand(x: torch.Tensor, shape: tuple[int, ...] | None = None) -> Operand:
    """The memory behind a tensor, or behind `shape` elements of it."""
    if shape is None:
        shape = tuple(1 if stride == 0 else n for n, stride in zip(x.shape, x.stride()))
    return Operand(tuple(shape), x.element_size())


# ops that move nothing: allocation, metadata, values read by the host
FREE = {
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "set_", "_unsafe_view", "alias",
    "lift_fresh", "_local_scalar_dense", "is_same_size", "resize_", "equal", "sym_size", "resolve_conj", "resolve_neg",
}  # fmt: skip
CREATED = {
    "new_zeros",
    "new_ones",
    "new_full",
    "zeros_like",
    "ones_like",
    "full_like",
}  # shaped like what they are given
WRITE_ONLY = {"copy_", "zero_", "fill_", "random_", "normal_", "uniform_"}  # in place, and never read first
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "mv", "addmv"}


@dataclass(eq=False)
class Ledger(TorchDispatchMode):
    """Every pass that torch ops and Triton kernels make inside `with ledger.recording(forms):`.

    An op counts its operands once and its result once; gathers and scatters count what they pick. `torch.mm` and `addmm`
    with out_dtype, which torch has on CUDA only, are computed here by widening, and counted as the CUDA product.
    """

    passes: list[Pass] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    @contextmanager
    def recording(self, forms: Mapping[str, Callable[[dict], Pass]]) -> Iterator[Ledger]:
        """`forms`: kernel → its closed form, (arguments) → Pass. RuntimeError when a form is not what was counted."""

        def launched(kernel: str, arguments: dict, traffic: Traffic) -> None:
            form = forms[kernel](arguments)
            if (form.bytes, form.flops) != (traffic.distinct, traffic.flops):
                raise RuntimeError(
                    f"{kernel}: the closed form says {form.bytes} bytes and {form.flops} FLOPs, counted were "
                    f"{traffic.distinct} and {traffic.flops}"
                )
            self.passes.append(replace(form, name=kernel))

        with interpreted(launched), self:
            yield self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if name in ("mm", "addmm") and func._overloadname.startswith("dtype"):
            return self._widened(name, func, args, kwargs)
        result = func(*args, **kwargs)
        if not (func.is_view or name in FREE):
            self.passes.append(_pass_of(name, func, args, kwargs, result))
        return result

    def _widened(self, name: str, func, args, kwargs):
        """out = [beta self +] a b of 16-bit operands, accumulated and returned in fp32."""
        *first, a, b, dtype = args[: 4 if name == "addmm" else 3]
        beta, out = kwargs.get("beta", 1), kwargs.get("out")
        result = a.to(dtype) @ b.to(dtype)
        reads = [operand(a), operand(b)]
        if first and beta:
            result = result.add_(first[0], alpha=beta)
            reads.append(operand(first[0]))
        out = result if out is None else out.copy_(result)
        self.passes.append(Pass(name, tuple(reads), (operand(out),), (*a.shape, b.shape[1])))
        return out


def _pass_of(name: str, func, args, kwargs, result) -> Pass:
    schema, given = func._schema.arguments, {}
    for argument, value in zip(schema, args):
        given[argument.name] = value
    given |= kwargs
    tensors = {k: [x for x in tree_leaves(v) if isinstance(x, torch.Tensor)] for k, v in given.items()}
    written = [a.name for a in schema if a.alias_info is not None and a.alias_info.is_write and a.name in given]
    outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
    if name in CREATED:
        return Pass(name, (), tuple(operand(x) for x in outputs))
    own = tensors.get("self", [None])[0]
    if name in ("index_select", "gather", "index", "take"):
        picked = [operand(own, operand(x).shape) for x in outputs]
        picked += [operand(x) for k in ("index", "indices") for x in tensors.get(k, ())]
        return Pass(name, tuple(picked), tuple(operand(x) for x in outputs))
    if name in ("index_put_", "_index_put_impl_"):
        indices = [x for x in given["indices"] if x is not None]
        shape = (*torch.broadcast_shapes(*(x.shape for x in indices)), *own.shape[len(given["indices"]) :])
        return Pass(name, tuple(operand(x) for x in [*indices, *tensors["values"]]), (operand(own, shape),))
    if name == "scatter_":
        index = given["index"]
        return Pass(
            name, tuple(operand(x) for x in [index, *tensors.get("src", ())]), (operand(own, tuple(index.shape)),)
        )
    if name in ("index_fill_", "index_add_"):
        shape = list(own.shape)
        shape[given["dim"]] = given["index"].numel()
        reads = [operand(x) for x in [given["index"], *tensors.get("source", ())]]
        if name == "index_add_":
            reads.append(operand(own, tuple(shape)))
        return Pass(name, tuple(reads), (operand(own, tuple(shape)),))
    reads = []
    for key, found in tensors.items():
        if key in written and (key.startswith("out") or name in WRITE_ONLY):
            continue
        if name.startswith("addmm") and key == "self" and given.get("beta", 1) == 0:
            continue
        reads += [operand(x) for x in found]
    writes = [x for key in written for x in tensors[key]] or outputs
    dims: tuple[int, ...] = ()
    if name in PRODUCTS:
        factors = [x for key, found in tensors.items() for x in found if key not in ("out",)][-2:]
        dims = (*factors[0].shape, *factors[1].shape[len(factors[0].shape) - 1 :])
    double = bool(dims) and outputs[0].dtype == torch.float64
    return Pass(name, tuple(reads), tuple(operand(x) for x in writes), dims, double)
