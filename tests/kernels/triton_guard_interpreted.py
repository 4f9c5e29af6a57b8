"""Kernels that are wrong on purpose, for the guard to notice, and right ones for it to pass; `test_triton_guard.py` starts
this file: `python triton_guard_interpreted.py GROUP`, see triton_cases.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton_cases import case, run_group


@triton.jit
def copy_kernel(x, out, n, step, MASK: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = x[i step], a block of i a program; loads are masked as MASK says."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = i < n
    if MASK == "late":
        value = tl.load(x + i * step, mask=i <= n, other=0.0)
    elif MASK == "none":
        value = tl.load(x + i * step)
    else:
        value = tl.load(x + i * step, mask=keep, other=0.0)
    tl.store(out + i, value, mask=keep)


@triton.jit
def shift_kernel(x, BLOCK: tl.constexpr):
    """x[i] = x[i + 1]: reads what the next program writes."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i + 1))


@triton.jit
def total_kernel(x, out, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    """out = sum of x, with programs that all write it."""
    value = tl.sum(tl.load(x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)), 0)
    if ATOMIC:
        tl.atomic_add(out, value)
    else:
        tl.store(out, value)


@triton.jit
def dot_kernel(x, out, PRECISION: tl.constexpr):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(x + at), input_precision=PRECISION))


@triton.jit
def number_kernel(out):
    """out[program] = how many programs ran before; `out` starts with the counter."""
    tl.store(out + 1 + tl.program_id(0), tl.program_id(0))


def caught(why, launch):
    try:
        launch()
    except Exception as error:
        assert why in str(error), str(error)
    else:
        raise AssertionError(f"nothing was said of {why}")


def copy(n, size, mask, step=1, x=None):
    x = torch.arange(float(size)) if x is None else x
    out = torch.full((n,), -1.0)
    copy_kernel[(-(-n // 8),)](x, out, n, step, MASK=mask, BLOCK=8)
    return out


@case("guard")
def right_kernels_pass():
    assert torch.equal(copy(20, 20, "right"), torch.arange(20.0))
    x = torch.arange(60.0)[1::3]
    assert torch.equal(copy(20, 0, "right", 3, x), x)
    assert torch.equal(copy(8, 0, "right", 0, torch.ones(1).expand(8)), torch.ones(8))
    dot_kernel[(1,)](torch.eye(16), out := torch.zeros(16, 16), PRECISION="ieee")
    assert torch.equal(out, torch.eye(16))


@case("guard", ("late", 20), ("none", 20), ("none", 23))
def out_of_bounds(mask, size):
    caught("out of bounds", lambda: copy(20, size, mask))


@case("guard")
def beside_a_view():
    """Elements of the storage that are not the view's are as wrong as those of another tensor."""
    wide = torch.arange(60.0)
    caught("out of bounds", lambda: copy(20, 0, "right", 2, wide[::3]))
    caught("out of bounds", lambda: copy(20, 0, "none", 1, wide[:20]))
    assert torch.equal(copy(20, 0, "none", 1, wide[:24]), wide[:20])


@case("guard", (1 << 29,), (-(1 << 29),), (1 << 28,))
def an_offset_that_wraps(step):
    """8 x 2^28 and 7 x 2^29 do not fit 32 bits: the wrapped address is seen, and nothing there is read."""
    caught("out of bounds", lambda: copy(9, 9, "right", step))


@case("guard")
def empty_tensors_have_no_elements():
    caught("out of bounds", lambda: copy(1, 0, "right"))


@case("guard")
def races():
    caught("race", lambda: shift_kernel[(8,)](torch.zeros(65), BLOCK=8))
    caught("race", lambda: total_kernel[(2,)](torch.ones(16), torch.zeros(1), ATOMIC=False, BLOCK=8))
    caught("atomic", lambda: total_kernel[(2,)](torch.ones(16), torch.zeros(1), ATOMIC=True, BLOCK=8))


@case("guard", ("tf32",), ("tf32x3",))
def reduced_precision(precision):
    caught("input_precision", lambda: dot_kernel[(1,)](torch.eye(16), torch.zeros(16, 16), PRECISION=precision))


@case("guard")
def programs_run_once_each_in_a_shuffled_order():
    import triton_guard
    from triton.runtime import interpreter

    seen, builder = [], interpreter.InterpreterBuilder
    index = builder.set_grid_idx
    builder.set_grid_idx = lambda self, *at: (index(self, *at), seen.append(self.grid_idx))
    out = torch.full((65,), -1, dtype=torch.int32)
    number_kernel[(64,)](out)
    builder.set_grid_idx = index
    assert torch.equal(out[1:], torch.arange(64, dtype=torch.int32))
    assert sorted(seen) == [(i, 0, 0) for i in range(64)] != seen
    orders = [triton_guard.Guard(seed) for seed in (5, 5, 6)]
    for guard in orders:
        guard.shuffle(64)
    same, again, other = (guard.order.tolist() for guard in orders)
    assert same == again != other


if __name__ == "__main__":
    run_group(lambda: copy(1, 1, "right"))
