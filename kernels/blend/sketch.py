"""`CountSketch`: gradients of any size as `width` numbers whose inner products are, in expectation, those of the gradients.

Each tensor is cut into blocks of `width` values. A block is multiplied by one fixed vector of random signs, shifted cyclically by
a random distance, given a random sign of its own and added up: one read of memory, two numbers a block, no index per element.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class CountSketch:
    """A fixed random linear map of a list of tensors to (width,) numbers that keeps inner products in expectation.

    With x_b the blocks, s_b their signs, r_b their shifts and e the signs of the positions:
    sketch(x) = sum_b s_b roll(e * x_b, r_b), so that
    <sketch(x), sketch(y)> = sum_b <x_b, y_b> + sum_{b != c} s_b s_c <roll(e * x_b, r_b), roll(e * y_c, r_c)>.
    Within a block nothing collides. Between blocks everything does, and the products s_b s_c have mean 0: no bias, and since
    those of two different pairs of blocks are uncorrelated, the variance is a sum over pairs of blocks. Each term needs both
    shift and signs to be small: without shifts the same positions always meet, so equal blocks (a repeated row) add
    up coherently, their signs e_p e_p = 1 included; without signs constant blocks do, whatever the shift. With both, a pair
    adds |x_b|^2 |y_c|^2 / width, at most doubled for equal blocks: the error of |x|^2 is about sqrt(2 / width) of it, and of
    <x, y> about sqrt((|x|^2 |y|^2 + <x, y>^2) / width). With the default width that is 0.55 % of |x|^2, and since a run keeps
    one map, it is no noise that steps average out: the errors of `path_statistics` and `optimal_alpha` do not contain it.

    Args: shapes: of the tensors, or how many values each holds; width: numbers in a sketch; seed: the same one gives the same
    map. Raises: ValueError for a width below 1.
    Source: Charikar, Chen, Farach-Colton 2002 (count sketch); blocks, shifts and shared signs in the place of its hashes.
    """

    def __init__(self, shapes: Iterable[Sequence[int] | int], width: int = 2**16, seed: int = 0):
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        self.width = width
        self.numels = [shape if isinstance(shape, int) else math.prod(shape) for shape in shapes]
        generator = torch.Generator().manual_seed(seed)

        def signs(count: int) -> Tensor:
            return 1 - 2 * torch.randint(2, (count,), generator=generator)

        self._signs = signs(width).to(torch.float32)
        blocks = sum(-(-numel // width) for numel in self.numels)
        shifts = torch.randint(width, (blocks,), generator=generator)
        self._blocks = list(zip(signs(blocks).tolist(), shifts.tolist()))

    @torch.no_grad()
    def __call__(self, tensors: Iterable[Tensor]) -> Tensor:
        """The sketch of `tensors`: (width,) float64, on their device (on the CPU where that has no float64).

        Floating tensors as many and as large as announced, on one device. Summed in fp32, in fp64 if one is fp64; the same
        bits for any number of threads. NaN and infinity go through.
        Raises: ValueError naming the first tensor that does not fit.
        """
        tensors = list(tensors)
        if len(tensors) != len(self.numels):
            raise ValueError(f"expected {len(self.numels)} tensors, got {len(tensors)}")
        for i, (x, numel) in enumerate(zip(tensors, self.numels)):
            if x.numel() != numel:
                raise ValueError(f"tensor {i} was announced with {numel} values, got {tuple(x.shape)}")
            if x.device != tensors[0].device:
                raise ValueError(f"tensor {i} is on {x.device}, but tensor 0 is on {tensors[0].device}")
        device = tensors[0].device if tensors else torch.device("cpu")
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
        signs = self._signs = self._signs.to(device)
        if dtype != signs.dtype:
            signs = signs.to(dtype)
        unrolled = torch.zeros(
            2 * self.width, dtype=dtype, device=device
        )  # a shift is an offset, its wrap the other half
        blocks = iter(self._blocks)
        for x in tensors:
            for part in x.reshape(-1).split(self.width) if x.numel() else ():
                sign, shift = next(blocks)
                unrolled[shift : shift + len(part)].addcmul_(signs[: len(part)], part.to(dtype), value=sign)
        if device.type not in ("cpu", "cuda"):
            unrolled = unrolled.cpu()
        return unrolled.double().view(2, self.width).sum(0)
