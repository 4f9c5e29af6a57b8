"""The parts of `make bench-gpu` that time kernels, each in a process of its own; gpu.py lists them.

A part takes its job, notes rows as it finds them and returns {who was left out: why}. Shapes are those of one DeepSeek-R1
trace on a 1.5B model; in a dry run they are tiny and the device is the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from longtrace import kernels as K

from . import head as head_bench
from . import head_inputs, head_peers
from .device import Clock, Times, measure, peak_mb, release
from .gpu import note

T, H, V, INTERMEDIATE = 15_360, 1_536, 151_936, 8_960  # DeepSeek-R1-Distill-Qwen-1.5B
HEADS, KV_HEADS, D = 12, 2, 128


def _case(*sizes: int) -> str:
    return " x ".join(f"{n:,}" for n in sizes)


def _relative(found, true) -> float:
    """Relative Frobenius error against float64."""
    true = true.double()
    return ((found.double() - true).norm() / true.norm()).item()


def _draw(job: dict) -> Callable:
    generator = torch.Generator(job["device"]).manual_seed(0)
    return lambda *shape, dtype=torch.bfloat16: torch.randn(*shape, device=job["device"], generator=generator).to(dtype)


def _time(job: dict, case: str, runs: dict[str, Callable], rows: dict[str, dict], seconds: float) -> dict[str, str]:
    """Times the runs in turn and notes each with what is known of it; returns what failed."""

    def after(times: Times) -> None:
        for name in times.ms:
            note(job, name, case, **rows.get(name, {}), **times.row(name))

    clock = Clock(job["device"])
    deadline = time.monotonic() + seconds
    times = measure(runs, clock, repeats=2 if job["dry"] else 9, warmup=1 if job["dry"] else 2, deadline=deadline,
                    after=after)  # fmt: skip
    late = {name: "the part's time was over before its first turn" for name in runs if name not in times.ms}
    return {f"{name} at {case}": why for name, why in (late | times.failed).items()}


# ----------------------------------------------------------------------------------------------------------------------
# Parity


def parity(job: dict) -> dict[str, str]:
    """Every op on the device against float64, and against torch's own error in the same dtype."""
    from longtrace.kernels.selfcheck import self_check

    for op, backend, error, ok in self_check():
        _hold(job, f"{op}, {backend}", "self-check", error, ok, "within 8 units of the dtype's precision")
    left: dict[str, str] = {}
    for case in (_parity_head, _parity_attention, _parity_layers):
        try:
            left |= case(job)
        except Exception as error:
            left[case.__name__.removeprefix("_parity_")] = f"{type(error).__name__}: {error}"
            note(job, case.__name__, "parity", check=f"FAILS: parity of {case.__name__}: {error}")
        release()
    return left


def _hold(job: dict, impl: str, case: str, error: float, ok: bool, bound: str) -> None:
    text = f"{'holds' if ok else 'FAILS'}: {impl}, {case}: error {error:.1e}, {bound}"
    note(job, impl, case, error=error, check=text, note="" if ok else "FAILS")


def _parity_head(job: dict) -> dict[str, str]:
    """bf16 states that look like a model's; dh and dW against float64, and against eager's error."""
    sizes = (64, 512, 32) if job["dry"] else (4096, 49152, 576)
    data = {k: v.to(job["device"]) for k, v in head_inputs.generate(*sizes).items()}
    h, w, y = data["h"], data["w"], data["y"]
    case = _case(sizes[0], sizes[2], sizes[1])
    keys = ["exact", "exact-log-prob", "compressed", "compressed-log-prob"]
    for kind in ("ones", "sequence"):
        c = head_inputs.coefficients(kind, len(h)).to(h.device)
        truth = head_bench.exact(h, w, y, {kind: c})
        eager = head_bench.compare(head_peers.run("eager", h, w, y, c), truth, kind)
        for key in keys:
            found = head_bench.compare(head_peers.run(key, h, w, y, c), truth, kind)
            # compressed: log-probs are exact, dh keeps to the 1 % of its estimate, dW is told by `make bench` in full
            bounds = {k: eager[k] for k in ("logprob_err", "dh_err", "dw_err")}
            if key.startswith("compressed"):
                bounds = {"logprob_err": eager["logprob_err"], "dh_err": 1e-2}
            for error, bound in bounds.items():
                _hold(job, f"{key}, c = {kind}: {error}", case, found[error], found[error] <= bound + 1e-6,
                      f"at most {bound:.1e}")  # fmt: skip
    return {}


def _attention_inputs(job: dict, lengths: list[int], heads=(HEADS, KV_HEADS), width: int = D):
    draw, total = _draw(job), sum(lengths)
    q, k, v = (draw(total, n, width).requires_grad_() for n in (heads[0], heads[1], heads[1]))
    ends = torch.tensor([0, *lengths]).cumsum(0).to(job["device"], torch.int32)
    return q, k, v, draw(total, heads[0], width), ends


def _attention_impls(ends, longest: int) -> dict[str, Callable]:
    """Packed attention of q, k, v by every implementation that imports here."""
    from longtrace.kernels.attention import dispatch

    def triton(q, k, v):
        return dispatch._triton()[0](q, k, v, ends, ends, True, q.shape[2] ** -0.5, (-1, -1), None, None)

    def flash(q, k, v):
        out = dispatch._flash_attn()[0](q, k, v, ends, ends, longest, longest, causal=True)
        return out[0] if isinstance(out, tuple) else out

    def torch_varlen(q, k, v):
        return dispatch._torch_varlen()[0](q, k, v, ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=True)

    def loop(q, k, v):
        from .attention import _loop

        return _loop((ends[1:] - ends[:-1]).tolist())(q, k, v)

    found = {"longtrace": lambda q, k, v: K.varlen_attention(q, k, v, ends, longest), "sdpa loop": loop}
    if dispatch._triton()[0] is not None:
        found["longtrace Triton"] = triton
    if ends.is_cuda:
        if dispatch._flash_attn()[0] is not None:
            found["flash-attn"] = flash
        if dispatch._torch_varlen()[0] is not None:
            found["torch varlen_attn"] = torch_varlen
    return found


def _parity_attention(job: dict) -> dict[str, str]:
    from longtrace.kernels.attention import reference

    lengths = [17, 1, 46] if job["dry"] else [700, 1, 1347]
    heads, width = ((2, 1), 16) if job["dry"] else ((HEADS, KV_HEADS), D)
    q, k, v, grad, ends = _attention_inputs(job, lengths, heads, width)
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = reference.varlen_attention(*leaves, ends)
    exact = [out, *torch.autograd.grad(out, leaves, grad.double())]
    impls, left, errors = _attention_impls(ends, max(lengths)), {}, {}
    for name, run in impls.items():
        try:
            out = run(q, k, v)
            errors[name] = [_relative(a, b) for a, b in zip([out, *torch.autograd.grad(out, (q, k, v), grad)], exact)]
        except Exception as error:
            left[f"attention {name}"] = f"{type(error).__name__}: {error}"
    if "sdpa loop" not in errors:
        raise RuntimeError(left["attention sdpa loop"])
    for name in ("longtrace", "longtrace Triton"):
        for what, error, bound in zip(("out", "dq", "dk", "dv"), errors.get(name, ()), errors["sdpa loop"]):
            # within half as much again of torch's own error: both are chance around the same rounding
            _hold(job, f"attention, {name}: {what}", _case(*lengths), error, error <= 1.5 * bound, f"SDPA {bound:.1e}")
    return left


def _layer_cases(job: dict, n: int, width: int, wide: int) -> dict[str, tuple]:
    """op → (ours, the formula in plain PyTorch, inputs)."""
    from longtrace.kernels.layers import reference

    draw = _draw(job)
    heads, head = (2, 16) if job["dry"] else (HEADS, D)
    angles = torch.arange(n, device=job["device"])[:, None] / 1e4 ** (
        torch.arange(head // 2, device=job["device"]) / (head // 2)
    )
    cos, sin = (torch.cat([f(angles)] * 2, -1).bfloat16() for f in (torch.cos, torch.sin))
    x, weight = draw(n, width), draw(width)
    return {
        "rms_norm": (lambda x, w: K.rms_norm(x, w, 1e-6), lambda x, w: reference.rms_norm(x, w, 1e-6), (x, weight)),
        "rms_norm with residual": (
            lambda x, w, r: K.rms_norm(x, w, 1e-6, residual=r),
            lambda x, w, r: reference.rms_norm(x, w, 1e-6, residual=r),
            (x, weight, draw(n, width)),
        ),
        "rope": (
            lambda q, k: K.rope(q, k, cos, sin),
            lambda q, k: reference.rope(q, k, cos.to(q.dtype), sin.to(q.dtype), head),
            (draw(n, heads, head), draw(n, max(1, heads // 6), head)),
        ),
        "swiglu": (K.swiglu, reference.swiglu, (draw(n, wide), draw(n, wide))),
    }  # fmt: skip


def _both_ways(run: Callable, inputs: tuple, grads: list | None = None) -> list[torch.Tensor]:
    """Results and the gradients of the inputs for fixed upstream gradients (ones)."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    out = list(out) if isinstance(out, tuple) else [out]
    return [*(x.detach() for x in out), *torch.autograd.grad(out, leaves, [torch.ones_like(x) for x in out])]


def _parity_layers(job: dict) -> dict[str, str]:
    sizes = (20, 48, 80) if job["dry"] else (2048, H, INTERMEDIATE)
    for op, (ours, formula, inputs) in _layer_cases(job, *sizes).items():
        exact = _both_ways(formula, tuple(x.double() for x in inputs))
        errors, bounds = ([_relative(a, b) for a, b in zip(_both_ways(run, inputs), exact)] for run in (ours, formula))
        worst = max(range(len(errors)), key=lambda i: errors[i] / max(bounds[i], 1e-12))
        ok = all(e <= 1.5 * b + 1e-6 for e, b in zip(errors, bounds))
        _hold(job, f"layers, {op}", _case(*sizes[:2]), errors[worst], ok, f"eager {bounds[worst]:.1e}")
    return {}


# ----------------------------------------------------------------------------------------------------------------------
# Times


HEAD = {  # head_peers key → its row of bench/traffic.py
    "gemms": None, "eager": "torch eager", "eager-compiled": None, "torch-auto": "torch chunked", "torch-1024": None,
    "liger": "Liger", "liger-wide": None, "cce-exact": "CCE exact", "cce-filtered": "CCE filtered", "quack": "QuACK",
    "trl": "TRL", "exact": "longtrace exact, known", "exact-log-prob": "longtrace exact, unknown",
    "compressed": "longtrace compressed, k = 64", "compressed-log-prob": None,
}  # fmt: skip


def head(job: dict) -> dict[str, str]:
    """The head at the size of bench/traffic.py: memory and errors of each implementation, then times in turn."""
    began, left = time.monotonic(), {}
    n, v, width = (32, 512, 32) if job["dry"] else (T, V, H)
    data = head_inputs.generate(min(n, head_inputs.ROWS), v, width)  # then the same rows again: the CPU draws them
    more = -(-n // len(data["h"]))
    h, y = (data[k].repeat(more, *[1] * (data[k].ndim - 1))[:n].to(job["device"]) for k in ("h", "y"))
    w, c, case = data["w"].to(job["device"]), torch.full((n,), 1.0 / n, device=job["device"]), _case(n, width, v)
    truth = head_bench.exact(h, w, y, {"ones": c})
    impls, rows, runs = head_peers.IMPLS | head_peers.GPU, {}, {}
    for key, predicts in HEAD.items():
        impl = impls[key]
        why = head_peers.missing(key)
        if job["dry"] and (impl.slow_start or key in ("trl", "liger-wide") or key.startswith("cce")):
            why = "left out of a dry run: it compiles, or needs a GPU"
        if key.startswith("torch-") and not hasattr(F, "linear_cross_entropy"):
            why = f"torch {torch.__version__} has no F.linear_cross_entropy"
        if why:
            left[key] = why
            continue
        result = []
        try:
            head_peers.run(key, h[:8], w, y[:8], c[:8]) if not impl.slow_start else None
            peak = peak_mb(lambda: result.append(head_peers.run(key, h, w, y, c)), job["device"])  # noqa: B023
            errors = head_bench.compare(result.pop(), truth, "ones")
        except Exception as error:
            left[key] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        finally:
            release()
        gradients = (h.nbytes + w.nbytes) / 1e6
        rows[impl_name(key)] = {
            "key": key, "predicts": predicts, "error": errors["dh_err"], **errors,
            "peak_mb": None if peak is None else peak - gradients, "note": impl.note,
        }  # fmt: skip
        note(job, impl_name(key), case, **rows[impl_name(key)], ms=None)
        runs[impl_name(key)] = lambda key=key: head_peers.run(key, h, w, y, c)
    del truth
    release()
    return left | _time(job, case, runs, rows, job["seconds"] - (time.monotonic() - began))


def impl_name(key: str) -> str:
    """An implementation in a table: its name, and the op where one name has two."""
    impl = (head_peers.IMPLS | head_peers.GPU)[key]
    return impl.impl + (", log_prob" if impl.op == head_peers.LOG_PROB else "")


def attention(job: dict) -> dict[str, str]:
    """Forward and backward of one long document, and of 60 short and one long in a row."""
    from .attention import lengths_of

    left, began = {}, time.monotonic()
    heads, width = ((2, 1), 16) if job["dry"] else ((HEADS, KV_HEADS), D)
    cases = {"one": [48]} if job["dry"] else {"one:15360": [T], "mix:16384": lengths_of("mix:16384")}
    for i, (name, lengths) in enumerate(cases.items()):
        q, k, v, grad, ends = _attention_inputs(job, lengths, heads, width)
        runs = {}
        for impl, run in _attention_impls(ends, max(lengths)).items():
            # the names q, k, v, grad mean this case's: they are bound here
            def both(run=run, leaves=(q, k, v), grad=grad):
                return torch.autograd.grad(run(*leaves), leaves, grad)

            runs[impl] = both
        spent = time.monotonic() - began
        left |= _time(job, name, runs, {}, (job["seconds"] - spent) / (len(cases) - i))
    return left


def layers(job: dict) -> dict[str, str]:
    """Norms, rotary embedding and gated activations, forward and backward: ours, eager, compiled."""
    left, began = {}, time.monotonic()
    sizes = (20, 48, 80) if job["dry"] else (T, H, INTERMEDIATE)
    cases = _layer_cases(job, *sizes)
    for i, (op, (ours, formula, inputs)) in enumerate(cases.items()):
        runs = {"longtrace": lambda run=ours, x=inputs: _both_ways(run, x),
                "torch eager": lambda run=formula, x=inputs: _both_ways(run, x)}  # fmt: skip
        if not job["dry"]:
            compiled = torch.compile(formula)
            runs["torch compiled"] = lambda run=compiled, x=inputs: _both_ways(run, x)
        spent = time.monotonic() - began
        left |= _time(job, op, runs, {}, (job["seconds"] - spent) / (len(cases) - i))
    return left


def advantages(job: dict) -> dict[str, str]:
    """Group advantages of 8 rewards a prompt: ours, and TRL's formula in PyTorch."""
    if not hasattr(K, "group_advantages"):
        return {"group_advantages": "not in this version"}
    groups = 16 if job["dry"] else 65_536
    rewards = _draw(job)(groups * 8, dtype=torch.float32).round()
    offsets = torch.arange(0, groups * 8 + 1, 8)

    def eager():
        x = rewards.view(-1, 8)
        return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-4)

    x = rewards.double().view(-1, 8)
    exact = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-4)
    error = _relative(K.group_advantages(rewards, offsets).values, exact.flatten())
    own = _relative(eager().flatten(), exact.flatten())
    _hold(job, "longtrace", f"{groups:,} x 8", error, error <= own + 1e-6, f"eager {own:.1e}")
    runs = {"longtrace": lambda: K.group_advantages(rewards, offsets), "torch eager": eager}
    return _time(job, f"{groups:,} x 8", runs, {"longtrace": {"error": error}}, job["seconds"] / 2)


def blend(job: dict) -> dict[str, str]:
    """Two gradients of 0.5B parameters into one, with norms and dot: ours, and torch's foreach ops."""
    if not hasattr(K, "blend_gradients"):
        return {"blend_gradients": "not in this version"}
    draw, shapes = _draw(job), [(64, 16)] * 3 if job["dry"] else [(8960, 1536)] * 36
    trace, empty = ([draw(*shape) for shape in shapes] for _ in range(2))
    exact = [0.25 * a.double() + 0.75 * b.double() for a, b in zip(trace, empty)]
    own = max(_relative(a.lerp(b, 0.75), e) for a, b, e in zip(trace, empty, exact))
    mine = [x.clone() for x in trace]
    stats = K.blend_gradients(mine, empty, 0.25)
    error = max(_relative(a, e) for a, e in zip(mine, exact))
    dot = sum((a.double() * b.double()).sum() for a, b in zip(trace, empty))
    size = sum(a.double().square().sum() for a in trace)
    del exact
    case = f"{sum(x.numel() for x in trace) / 1e6:,.0f}M values"
    _hold(job, "longtrace", case, error, error <= own + 1e-6, f"torch.lerp {own:.1e}")
    wrong = max(abs(float(stats.dot - dot)), abs(float(stats.trace_sq - size))) / float(size)
    _hold(job, "longtrace: |g|^2 and dot", case, wrong, wrong <= 1e-5, "at most 1e-5")

    def foreach():
        sizes = [torch.stack(torch._foreach_norm(x)).norm() for x in (mine, empty)]
        product = torch.stack([(a * b).sum(dtype=torch.float32) for a, b in zip(mine, empty)]).sum()
        torch._foreach_lerp_(mine, empty, 0.75)
        return sizes, product

    runs = {"longtrace": lambda: K.blend_gradients(mine, empty, 0.25), "torch foreach": foreach}
    return _time(job, case, runs, {"longtrace": {"error": error}}, job["seconds"] / 2)
