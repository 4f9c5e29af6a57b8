"""Packed linear layers against float64, torch's own product beside them; the same bits whatever rows come along."""

import pytest
import torch

from longtrace.kernels import backend, extension
from longtrace.kernels.linear import PackedLinear, packs

pytestmark = pytest.mark.skipif(not extension.LOADED, reason=extension.WHY)
DTYPES = [torch.float32] + ([torch.bfloat16] if extension.BF16_OPERANDS else [])
SHAPES = [(1, 1, 1), (1, 32, 32), (16, 33, 64), (17, 96, 64), (31, 31, 65), (32, 576, 576), (33, 192, 100), (63, 70, 1536),
          (64, 64, 64), (128, 40, 96), (129, 1000, 50), (300, 65, 576)]  # fmt: skip


def operands(n, N, K, dtype, seed, scale=1.0):
    torch.manual_seed(seed)
    return (torch.randn(n, K) * scale).to(dtype), (torch.randn(N, K) / K**0.5).to(dtype), torch.randn(N).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "N", "K"), SHAPES)
def test_against_float64(n, N, K, dtype, seed):
    x, weight, bias = operands(n, N, K, dtype, seed, scale=3.0)
    for add in (None, bias):
        exact = x.double() @ weight.double().t() + (0 if add is None else add.double())
        layer = PackedLinear([weight], [add])
        kept, rounded = layer(x, fp32=True), layer(x)
        assert kept.dtype == torch.float32 and rounded.dtype == dtype and kept.shape == rounded.shape == (n, N)
        # K products of standard normals, summed in fp32: a few roundings of a sum of size 3
        assert (kept.double() - exact).abs().max() <= 2e-6 * (3 + exact.abs().max())
        assert torch.equal(rounded, kept.to(dtype))  # once, to the nearest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rows_bits_depend_on_it_alone(dtype, seed):
    x, weight, bias = operands(150, 100, 96, dtype, seed)
    layer = PackedLinear([weight], [bias])
    whole, threads = layer(x), torch.get_num_threads()
    for part in (slice(0, 1), slice(3, 20), slice(40, 72), slice(7, 71), slice(149, 150), slice(0, 0)):
        assert torch.equal(layer(x[part]), whole[part])
    assert torch.equal(layer(x[::3]), whole[::3])  # a stride between rows
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(layer(x), whole) and torch.equal(layer(x), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_weights_are_one_below_the_other(dtype, seed):
    x, first, bias = operands(9, 40, 64, dtype, seed)
    _, second, _ = operands(9, 7, 64, dtype, seed + 1)
    both = PackedLinear([first, second], [bias, None])(x)
    assert torch.equal(both, torch.cat([PackedLinear([first], [bias])(x), PackedLinear([second])(x)], 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_row(dtype, seed):
    x, weight, _ = operands(20, 50, 64, dtype, seed)
    x[3, 5], x[4, 6] = float("inf"), float("nan")
    out = PackedLinear([weight])(x)
    wrong = torch.zeros(20, dtype=torch.bool)
    wrong[[3, 4]] = True
    assert torch.equal(~torch.isfinite(out).all(1), wrong) and out[4].isnan().all()


def test_what_does_not_fit_is_refused(seed):
    x, weight, bias = operands(3, 40, 64, torch.float32, seed)
    layer = PackedLinear([weight])
    for bad in (x[:, :32], x.half(), x.double(), x[0]):
        with pytest.raises(RuntimeError):
            layer(bad)
    with pytest.raises(RuntimeError):
        PackedLinear([weight], [bias[:7]])(x)
    assert packs(weight) == (backend.forced() in (None, "cpu"))
    assert not packs(weight.half()) and not packs(weight, weight.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fakes_tell_the_shapes(dtype, seed):
    x, weight, bias = operands(5, 70, 65, dtype, seed)
    torch.library.opcheck(torch.ops.longtrace.pack_weight, (weight,), test_utils="test_faketensor")
    packed = torch.ops.longtrace.pack_weight(weight)
    for fp32 in (False, True):
        arguments = (x, packed, 70, bias.float(), fp32)
        torch.library.opcheck(torch.ops.longtrace.packed_linear, arguments, test_utils="test_faketensor")
