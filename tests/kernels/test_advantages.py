"""Group advantages: against float64 and torch's own formula, exact zeros, ragged and unscored groups, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch

from longtrace import kernels as K
from longtrace.kernels import extension
from longtrace.kernels.advantages import dispatch, reference

SIZES = (8, 0, 1, 2, 3, 31, 32, 33, 64, 1023, 1025, 0)
OPTIONS = tuple(itertools.product(("group_std", "none"), ("mean", "leave_one_out"), ("sample", "population")))


def offsets_of(sizes):
    return torch.tensor([0, *itertools.accumulate(sizes)])


def truth(rewards, offsets, scale="group_std", baseline="mean", std="sample"):
    how = dict(by_std=scale == "group_std", leave_one_out=baseline == "leave_one_out", sample=std == "sample")
    return reference.group_advantages(rewards.double(), offsets, **how)


@pytest.fixture(params=["here", "reference"])
def backend(request, force):
    if request.param == "reference":
        force("reference")
    return request.param


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_every_option_against_float64(seed, backend, options, dtype):
    rewards = torch.randn(sum(SIZES)).to(dtype)
    rewards[torch.rand(len(rewards)) < 0.1] = torch.nan
    got = K.group_advantages(rewards, offsets_of(SIZES), **dict(zip(("scale", "baseline", "std"), options)))
    values, degenerate, counts = truth(rewards, offsets_of(SIZES), *options)
    assert got.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    eps = torch.finfo(got.values.dtype).eps
    # fp32: one rounding of a sum in float64; fp64: roundings of the sums themselves
    torch.testing.assert_close(
        got.values.double(), values, rtol=0.51 * eps if dtype != torch.float64 else 1e-12, atol=1e-300
    )
    assert torch.equal(got.degenerate, degenerate) and [int(c) for c in got.counts] == counts.tolist()


@pytest.mark.parametrize("spread", (1.0, 1e-3))
def test_no_worse_than_torch(seed, spread):
    rewards = 1 + spread * torch.rand(64, 16)
    theirs = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)  # TRL's
    wide = rewards.double()
    exact = (wide - wide.mean(1, keepdim=True)) / (wide.std(1, keepdim=True) + 1e-4)
    ours = K.group_advantages(rewards.flatten(), range(0, 64 * 16 + 1, 16)).values.view(64, 16)
    assert (ours - exact).norm() <= (theirs - exact).norm() + 1e-12


@pytest.mark.parametrize("value", (0.7, 0.1, 1 / 3, 1.0, 0.0, -1.0, 1e-20, 1e30))
def test_constant_groups_are_exactly_zero(backend, value):
    got = K.group_advantages(torch.full((24,), value), [0, 8, 21, 24])
    assert not got.values.any() and got.degenerate.all()
    assert int(got.counts.all_right if value > 0 else got.counts.all_wrong) == 3 == sum(map(int, got.counts))


def test_pinned_values(backend):
    two = torch.tensor([0.0, 1.0])
    assert K.group_advantages(two, [0, 2]).values.tolist() == pytest.approx(
        [-0.5 / (0.5**0.5 + 1e-4), 0.5 / (0.5**0.5 + 1e-4)]
    )
    assert K.group_advantages(two, [0, 2], std="population").values.tolist() == pytest.approx(
        [-0.5 / 0.5001, 0.5 / 0.5001]
    )
    assert K.group_advantages(two, [0, 2], scale="none").values.tolist() == [-0.5, 0.5]
    assert K.group_advantages(two, [0, 2], scale="none", baseline="leave_one_out").values.tolist() == [-1.0, 1.0]


def test_leave_one_out_is_the_mean_of_the_others(seed, backend):
    rewards = torch.rand(9, dtype=torch.float64)
    ours = K.group_advantages(rewards, [0, 4, 9], scale="none", baseline="leave_one_out").values
    for begin, end in ((0, 4), (4, 9)):
        for i in range(begin, end):
            others = torch.cat((rewards[begin:i], rewards[i + 1 : end]))
            assert ours[i].item() == pytest.approx((rewards[i] - others.mean()).item(), abs=1e-15)
    mean = K.group_advantages(rewards, [0, 4, 9], scale="none").values
    torch.testing.assert_close(ours[:4], 4 / 3 * mean[:4])


def test_unscored_rewards_leave_the_statistics(backend):
    nan, inf = torch.nan, torch.inf
    got = K.group_advantages(torch.tensor([1.0, nan, 0.0, inf, nan, -inf, nan, 1.0, nan]), [0, 4, 5, 7, 9, 9])
    alone = K.group_advantages(torch.tensor([1.0, 0.0]), [0, 2]).values
    assert got.values.tolist() == [alone[0], 0, alone[1], 0, 0, 0, 0, 0, 0]
    assert got.degenerate.tolist() == [False, True, True, True, True]
    assert {k: int(v) for k, v in got.counts._asdict().items()} == dict(all_right=1, all_wrong=0, mixed=1, unscored=3)


def test_groups_do_not_see_each_other(seed, backend):
    rewards, offsets = torch.randn(sum(SIZES)), offsets_of(SIZES).tolist()
    whole = K.group_advantages(rewards, offsets).values
    for begin, end in itertools.pairwise(offsets):
        part = K.group_advantages(rewards[begin:end], [0, end - begin]).values
        torch.testing.assert_close(whole[begin:end], part, rtol=0 if backend == "here" else 1e-7, atol=0)
    order = torch.randperm(64)
    begin = offsets[SIZES.index(64)]
    turned = K.group_advantages(rewards[begin : begin + 64][order], [0, 64]).values
    torch.testing.assert_close(turned, whole[begin : begin + 64][order], rtol=1e-6, atol=1e-7)


def test_no_rewards_and_no_groups(backend):
    for offsets in ([0], [0, 0, 0]):
        got = K.group_advantages(torch.empty(0), offsets)
        assert got.values.shape == (0,) and len(got.degenerate) == len(offsets) - 1 == int(got.counts.unscored)


@pytest.mark.parametrize("dtype", (torch.bool, torch.int64, torch.uint8), ids=str)
def test_whole_numbers(backend, dtype):
    got = K.group_advantages(torch.tensor([1, 0, 0, 1]).to(dtype), torch.tensor([0, 4], dtype=torch.int32))
    assert got.values.dtype == torch.float32
    assert got.values.tolist() == K.group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), [0, 4]).values.tolist()


def test_strided_rewards_that_take_a_gradient(backend):
    rewards = torch.rand(20, requires_grad=True)
    got = K.group_advantages(rewards[::2], [0, 10])
    assert not got.values.requires_grad
    assert torch.equal(got.values, K.group_advantages(rewards.detach()[::2].contiguous(), [0, 10]).values)


@pytest.mark.parametrize(
    "offsets, message",
    (
        ([0, 5, 3, 8], r"group_offsets\[2\] is 3, below group_offsets\[1\] = 5"),
        ([1, 8], r"group_offsets\[0\] is 1; it must be 0"),
        ([0, 7], r"group_offsets\[1\] is 7; it must be 8, the number of rewards"),
        ([0, 9], r"group_offsets\[1\] is 9; it must be 8"),
        ([], "at least one integer"),
        ([0.0, 8.0], "at least one integer, got torch.float32"),
        ([[0, 8]], r"got torch.int64 \(1, 2\)"),
    ),
)
def test_bad_offsets_are_named(offsets, message):
    with pytest.raises(ValueError, match=message):
        K.group_advantages(torch.zeros(8), offsets)


def test_bad_options_and_rewards_are_named():
    for option, accepted in (("scale", "group_std"), ("baseline", "mean"), ("std", "sample")):
        with pytest.raises(ValueError, match=f"{option} must be .*{accepted}.* got 'other'"):
            K.group_advantages(torch.zeros(2), [0, 2], **{option: "other"})
    with pytest.raises(ValueError, match=r"real vector, got torch.float32 \(2, 2\)"):
        K.group_advantages(torch.zeros(2, 2), [0, 2])


@pytest.mark.skipif(not extension.LOADED, reason=extension.WHY)
def test_op_fakes_threads_and_own_checks(seed):
    op = torch.ops.longtrace.group_advantages
    rewards, offsets = torch.randn(sum(SIZES)), offsets_of(SIZES)
    torch.library.opcheck(op.default, (rewards, offsets, True, False, True))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(op(rewards, offsets, True, False, True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
    for bad, message in (
        (offsets[:-2], "run from 0"),
        (offsets.flip(0), "must not decrease"),
        (offsets + 5, "is not in"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(rewards, bad.contiguous(), True, False, True)


def test_the_choice_has_a_reason():
    for device, dtype in itertools.product(("cpu", "cuda", "mps"), (torch.float32, torch.float64)):
        _, name, why = dispatch.choose(device, dtype)
        assert name in ("C++", "CUDA", "PyTorch") and why
