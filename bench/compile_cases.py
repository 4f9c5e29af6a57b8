"""Every Triton kernel in every shipped configuration, as the compiler is to see it: argument types, constants, options.

A new kernel joins by a generator of cases here; the tests fail for a kernel of these modules that no case compiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from triton.runtime import JITFunction

from longtrace.kernels.attention import cuda
from longtrace.kernels.head import triton_columns, triton_rows, triton_tile

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# What the kernels call their arguments. Whatever is not a number here is a pointer, of the type POINTERS gives it, or
# the operands' own.
SIZES = {"V", "H", "T", "R", "F", "blocks", "documents", "steps", "heads", "group", "D", "DV", "left", "right"}
REALS = {"scale", "bias_scale", "inv_cap", "out_scale", "inner", "outer"}
POINTERS = {
    "target": "i64", "columns": "i64", "offsets_q": "i32", "offsets_k": "i32",
} | dict.fromkeys(
    ("bias", "maximum", "log_sum", "log_prob", "entropy", "a", "e", "logits", "reference", "total", "peak", "dot", "mass",
     "total_out", "peak_out", "dot_out", "mass_out", "stats", "delta", "sinks"), "fp32",
)  # fmt: skip


def is_size(argument: str) -> bool:
    """Whether a kernel's argument is a size, a stride or a position: a 32-bit integer."""
    return argument in SIZES or argument.endswith(("stride", "_head"))


@dataclass(frozen=True)
class Case:
    """One object to compile."""

    kernel: str
    """Family and name: "tile exp"."""
    config: str
    """What tells its configurations apart: "bf16 aligned, all inputs"."""
    arch: str
    function: JITFunction
    signature: dict[str, str]
    """Argument → Triton type ("*bf16", "i32", "constexpr")."""
    constants: dict[str, Any]
    options: dict[str, Any]
    product: bool
    """Whether it multiplies matrices of 16-bit operands: then there has to be a matrix instruction."""

    @property
    def name(self) -> str:
        return f"{self.kernel}, {self.config}, {self.arch}"


def _case(kernel, config, arch, function, sizes, flags, dtype, product=False, **pointers) -> Case:
    """`sizes`: the shipped block sizes and options; `flags`: other constants; pointers: types that differ."""
    constants = flags | {k: v for k, v in sizes.items() if k.isupper()}
    options = {k: v for k, v in sizes.items() if not k.isupper()}
    signature = {}
    for x in function.arg_names:
        if x in constants:
            signature[x] = "constexpr"
        elif is_size(x):
            signature[x] = "i32"
        elif x in REALS and x not in pointers:
            signature[x] = "fp32"
        else:
            signature[x] = "*" + pointers.get(x, POINTERS.get(x, dtype))
    return Case(kernel, config, arch, function, signature, constants, options, product)


# ----------------------------------------------------------------------------------------------------------------------
# The head

TILE = {"exp": triton_tile.exp_kernel, "gradient": triton_tile.gradient_kernel}
INPUTS = {"all inputs": True, "no options": False}


def head_cases(arch: str, inputs: str = "all inputs") -> Iterator[Case]:
    """The head's kernels with their optional inputs all there or all absent (a key of INPUTS)."""

    def made(kernel, dtype, function, sizes, group="", product=False, aligned=True, **pointers) -> Case:
        on = {x: INPUTS[inputs] for x in function.arg_names if x.startswith("HAS_")}
        flags = {"ALIGNED": aligned, "ALIGNED_V": aligned and "any V" not in group}
        flags = on | {x: value for x, value in flags.items() if x in function.arg_names}
        config = ", ".join(filter(None, (" ".join(filter(None, (dtype, group))), inputs)))
        return _case(kernel, config, arch, function, sizes, flags, dtype, product, **pointers)

    for name, sizes in triton_rows.BLOCKS.items():
        for out in DTYPES if name == "dlogits" else ("fp32",):
            yield made(f"rows {name}", out, getattr(triton_rows, f"{name}_kernel"), sizes, out=out)
    for name, sizes in triton_columns.BLOCKS.items():
        for p in DTYPES:
            pointers = {"out": p if name == "compact" else "fp32"} | ({"scale": "fp32"} if name == "column_max" else {})
            yield made(f"columns {name}", p, getattr(triton_columns, f"{name}_kernel"), sizes, **pointers)
    yield made("tile sums", "fp32", triton_tile.sums_kernel, triton_tile.SUMS)
    for group, sizes in triton_tile.BLOCKS.items():
        wide = group == "aligned"
        yield made(
            "tile target", "bf16", triton_tile.target_kernel, triton_tile.TARGET, group, aligned=wide, out="fp32"
        )
        for name, function in TILE.items():
            for V in ("", " any V") if wide else ("",):
                yield made(f"tile {name}", "bf16", function, sizes, group + V, product=True, aligned=wide)


# ----------------------------------------------------------------------------------------------------------------------
# Attention

ATTENTION = {"forward": cuda.forward_kernel, "dk_dv": cuda.dk_dv_kernel, "dq": cuda.dq_kernel}
FEATURES = {  # what is on; PADDED follows from the head dims
    "full": (),
    "causal": ("HAS_RIGHT",),
    "window": ("HAS_LEFT", "HAS_RIGHT", "HAS_SINKS"),
    "all": ("HAS_LEFT", "HAS_RIGHT", "HAS_CAP", "HAS_SINKS"),
}
WIDTHS = ((64, 64), (96, 96), (128, 128), (128, 64), (256, 256))


def attention_case(arch: str, name: str, dtype: str, D: int, DV: int, features: str = "causal") -> Case:
    """The kernel `name` (of ATTENTION, or "delta") with the sizes it ships for `arch`, head dims of keys and values."""
    if name == "delta":
        function, sizes = cuda.delta_kernel, {**cuda.DELTA, "BLOCK_DV": cuda.padded(DV)}
        config = f"{dtype} {DV}"
    else:
        function, sizes = ATTENTION[name], cuda.sizes(name, DTYPES[dtype], D, DV, "HAS_CAP" in FEATURES[features], arch)
        config = f"{dtype} {D} {DV}, {features}"
    flags = {x: x in FEATURES[features] for x in function.arg_names if x.startswith("HAS_")}
    flags["PADDED"] = cuda._is_padded(DV if name == "delta" else D, DV)
    return _case(
        f"attention {name}", config, arch, function, sizes, flags, dtype, name != "delta" and dtype != "fp32"
    )  # fmt: skip


def attention_cases(
    arch, dtypes=("bf16", "fp32"), widths=((64, 64), (128, 128), (256, 256)), features=("causal", "all")
):
    """Without arguments, each shipped size: narrow and wide operands, three widths, and what training uses or costs most."""
    for dtype in dtypes:
        for D, DV in widths:
            for name in ATTENTION:
                for feature in features:
                    yield attention_case(arch, name, dtype, D, DV, feature)
        for DV in dict.fromkeys(DV for _, DV in widths):
            yield attention_case(arch, "delta", dtype, DV, DV)


# ----------------------------------------------------------------------------------------------------------------------
# All of them


def shipped(arch: str) -> list[Case]:
    """Every kernel in every shipped configuration for `arch`."""
    return [*head_cases(arch), *attention_cases(arch)]


def everything(arch: str) -> list[Case]:
    """`shipped`, and fp16, every feature, unequal and padded head dims, and the head without its options."""
    cases = [*head_cases(arch), *head_cases(arch, "no options"), *attention_cases(arch, DTYPES, WIDTHS, FEATURES)]
    return list({case.name: case for case in cases}.values())


def quick() -> list[Case]:
    """A few of each family on a part of each kind, within a minute: what a change is most likely to break."""
    hot = [attention_case("sm_90", name, "bf16", 128, 128) for name in ATTENTION]
    hot += [
        attention_case("sm_120", "dk_dv", "bf16", 64, 64, "all"), attention_case("sm_100", "forward", "bf16", 128, 128),
        attention_case("gfx942", "forward", "bf16", 128, 128), attention_case("sm_80", "delta", "bf16", 128, 128),
    ]  # fmt: skip
    return hot + [x for x in head_cases("sm_90") if x.config in ("fp32, all inputs", "bf16 aligned, all inputs")]
