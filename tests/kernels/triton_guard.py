"""What Triton's interpreter does not check of a launch: addresses, who writes what, the order of programs, precision.

What: every live address of a load or store must be an element of the very tensor its pointer came from; programs run in
a shuffled order, no two write one value and none reads what another wrote, so every order gives the same bits; every dot
asks for "ieee". How: kernels see addresses far apart, one region per argument, translated back at each access.
"""

from __future__ import annotations

import numpy as np

REGION = 1 << 40  # bytes of virtual addresses an argument has to itself: an offset that wraps at 32 bits stays inside


class GuardError(Exception):
    """A launch did what a GPU would not forgive."""


def merged(shape, strides) -> list[tuple[int, int]]:
    """[(size, stride)] of a view, the widest stride first, with dimensions that continue each other as one."""
    dims: list[tuple[int, int]] = []
    for size, stride in sorted(((n, s) for n, s in zip(shape, strides) if n > 1 and s), key=lambda d: -d[1]):
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    return dims


class Argument:
    """A tensor as a kernel gets it: where its elements are, at which virtual addresses."""

    def __init__(self, tensor, number: int) -> None:
        self.shape, self.itemsize, self.empty = tuple(tensor.shape), tensor.element_size(), not tensor.numel()
        self.dims = merged(tensor.shape, tensor.stride())
        self.key = (tensor.data_ptr(), self.itemsize, *self.dims)  # the same for the same memory passed twice
        self.numel = int(np.prod([size for size, _ in self.dims], dtype=np.int64))
        real = tensor.data_ptr()
        self.base = number * REGION + REGION // 2 + real % 256  # as aligned as it was
        self.shift = np.uint64((real - self.base) % (1 << 64))

    def places(self, addresses: np.ndarray) -> np.ndarray:
        """The number of the element at each address, in the order of `dims`. Raises GuardError where there is none."""
        offsets = addresses.astype(np.int64) - self.base
        rest, wrong = offsets >> (self.itemsize.bit_length() - 1), offsets & (self.itemsize - 1) != 0
        place = np.zeros_like(rest)
        for size, stride in self.dims:
            index = rest // stride if stride > 1 else rest
            wrong |= (index < 0) | (index >= size)
            place = place * size + index
            rest = rest - index * stride
        wrong |= rest != 0
        if self.empty or wrong.any():
            offset = int(offsets[0 if self.empty else np.argmax(wrong)])
            raise GuardError(f"out of bounds: byte {offset} of a {self.shape} tensor of {self.itemsize}-byte elements")
        return place


class Guard:
    """The launch under way: its arguments, the order of its programs, and which of them wrote what."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.launches = 0
        self.begin()

    def begin(self) -> None:
        self.launches += 1
        self.arguments: list[Argument] = []
        self.writers: dict[tuple, np.ndarray] = {}  # 1 + the program that wrote an element, 0 for none
        self.program = 0

    def register(self, tensor) -> int:
        """The virtual address that stands for a tensor's own."""
        self.arguments.append(Argument(tensor, len(self.arguments) + 1))
        return self.arguments[-1].base

    def shuffle(self, programs: int) -> None:
        self.order = self.random.permutation(programs)

    def translate(self, addresses: np.ndarray, live: np.ndarray, write: bool) -> np.ndarray:
        """The real addresses of an access by the running program. Raises GuardError for one that must not be."""
        used = addresses[live]
        if not used.size:
            return addresses
        number = int(used[0]) // REGION
        if not 0 < number <= len(self.arguments) or (used // np.uint64(REGION) != number).any():
            raise GuardError("out of bounds: an address far from every argument")
        argument = self.arguments[number - 1]
        places = argument.places(used)
        if write and argument.key not in self.writers:
            self.writers[argument.key] = np.zeros(argument.numel, np.int32)
        if argument.key in self.writers:
            writers = self.writers[argument.key]
            if ((writers[places] != 0) & (writers[places] != self.program + 1)).any():
                raise GuardError(f"a race: two programs {'write' if write else 'share'} an element of {argument.shape}")
            if write:
                writers[places] = self.program + 1
        return addresses + argument.shift


def install(seed: int) -> Guard:
    """Put a guard around every launch of this process; triton must have been imported with TRITON_INTERPRET=1."""
    from triton.runtime import interpreter

    guard = Guard(seed)
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    call, convert = interpreter.GridExecutor.__call__, interpreter._implicit_cvt
    load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx

    def launch(self, *args, **kwargs):
        guard.begin()
        return call(self, *args, **kwargs)

    def implicit_cvt(arg):
        value = convert(arg)
        if hasattr(arg, "data_ptr"):
            value.handle.data = np.array([guard.register(arg)], dtype=np.uint64)
        return value

    def set_grid_dim(self, *dims):
        set_dim(self, *dims)
        guard.shuffle(int(np.prod(dims)))

    def set_grid_idx(self, *index):
        guard.program = int(guard.order[np.ravel_multi_index(index, self.grid_dim)])
        set_index(self, *(int(i) for i in np.unravel_index(guard.program, self.grid_dim)))

    def masked_load(self, ptrs, mask, *rest, **options):
        return load(self, handle(guard.translate(ptrs.data, mask.data, False), ptrs.dtype), mask, *rest, **options)

    def masked_store(self, ptrs, value, mask, *rest, **options):
        ptrs = handle(guard.translate(ptrs.data, mask.data, True), ptrs.dtype)
        return store(self, ptrs, value, mask, *rest, **options)

    def ieee_dot(self, a, b, d, input_precision, *rest):
        if not str(input_precision).endswith("IEEE"):
            raise GuardError(f"a dot with input_precision {input_precision}, not ieee")
        return dot(self, a, b, d, input_precision, *rest)

    def atomic(self, *_):
        raise GuardError("an atomic: the order of its sum is not fixed")

    interpreter.GridExecutor.__call__ = launch
    interpreter._implicit_cvt = implicit_cvt
    builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx
    builder.create_masked_load, builder.create_masked_store, builder.create_dot = masked_load, masked_store, ieee_dot
    builder.create_atomic_rmw = builder.create_atomic_cas = atomic
    return guard
