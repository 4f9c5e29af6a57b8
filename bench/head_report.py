"""What the head benchmark concludes: ratios, lines that hold or fail, and its two pictures."""

from __future__ import annotations

import math
from pathlib import Path

from .head_peers import SWEEP

OURS = {"exact": "exact", "exact-log-prob": "log_prob", "compressed": "compressed",
        "compressed-log-prob": "compressed_log_prob"}  # fmt: skip
THEIRS = {"gemms": "three_gemms", "eager": "eager"}
COLOURS = {"gemms": "#15181e", "eager": "#9aa4b2", "exact": "#2f6fde", "exact-log-prob": "#7a5cd6",
           "compressed": "#1f9d6b", "compressed-log-prob": "#b8860b"}  # fmt: skip


def label(row: dict) -> str:
    """The implementation in a table's first column."""
    name = row["impl"] + {"linear_log_prob": ", log_prob", "linear + log_softmax + gather": ", log_softmax"}.get(
        row["op"], ""
    )
    return f"{name}, 2^{round(math.log2(row['eps']))}, k {row['rank']}" if row["eps"] else name


def at(rows: list[dict], inputs: str, key: str, kind: str = "ones") -> dict | None:
    """The row of an implementation (the longest T)."""
    found = [r for r in rows if (r["inputs"], r["key"], r["coefficients"]) == (inputs, key, kind)]
    return max(found, key=lambda r: r["T"], default=None)


def ratios(rows: list[dict]) -> dict[str, dict[str, float]]:
    """By input: X_vs_Y is how many times faster ours is, X_memory_vs_eager our workspace over eager's (c = ones)."""
    found: dict[str, dict[str, float]] = {}
    for inputs in dict.fromkeys(r["inputs"] for r in rows if not r["inputs"].startswith("lengths")):
        here = found[inputs] = {}
        for key, name in OURS.items():
            ours = at(rows, inputs, key)
            for peer, peer_name in THEIRS.items():
                theirs = at(rows, inputs, peer)
                if ours and theirs and ours["ms"] and theirs["ms"]:
                    here[f"{name}_vs_{peer_name}"] = theirs["ms"] / ours["ms"]
            eager = at(rows, inputs, "eager")
            if ours and eager and eager["workspace_mb"]:
                here[f"{name}_memory_vs_eager"] = ours["workspace_mb"] / eager["workspace_mb"]
    return found


# (input at least this long, ratio, comparison, bound)
SPEED = [("exact_vs_three_gemms", 1.0), ("exact_vs_eager", 1.35), ("log_prob_vs_three_gemms", 1 / 1.35),
         ("compressed_vs_eager", 2.5), ("compressed_vs_three_gemms", 1.8), ("compressed_log_prob_vs_eager", 2.5),
         ("compressed_log_prob_vs_three_gemms", 1.8)]  # fmt: skip
MEMORY = [("exact_memory_vs_eager", 1 / 20), ("compressed_memory_vs_eager", 1 / 6)]


def checks(rows: list[dict], ratios: dict[str, dict[str, float]]) -> list[str]:
    """Lines that hold or fail: speed and memory against eager and the GEMMs, errors against eager's."""
    lines = []

    def line(ok: bool, text: str) -> None:
        lines.append(f"{'holds' if ok else 'FAILS'}: {text}")

    for inputs, found in ratios.items():
        T = max(r["T"] for r in rows if r["inputs"] == inputs)
        for name, bound in SPEED:
            if name in found:
                line(found[name] >= bound, f"{inputs}: {name} {found[name]:.2f}, at least {bound:.2f}")
        for name, bound in MEMORY if T >= 15360 else []:
            if name in found:
                line(found[name] <= bound, f"{inputs}: {name} {found[name]:.3f}, at most {bound:.3f}")
        for row in (r for r in rows if r["inputs"] == inputs and r["key"] in OURS):
            eager = at(rows, inputs, "eager", row["coefficients"])
            what = f"{inputs}, {row['key']}, c {row['coefficients']}"
            if row["logprob_err"] is not None:
                line(row["logprob_err"] <= 1e-4, f"{what}: log p within {row['logprob_err']:.1e}, at most 1e-4")
            exact = row["key"].startswith("exact")
            if eager is None or not (exact or row["coefficients"] in ("ones", "sequence")):
                continue
            for error in ("dh_err", "dw_err", "dw_row_err") if exact else ("dh_err",):
                if row[error] is not None and eager[error] is not None:
                    line(row[error] <= eager[error], f"{what}: {error} {row[error]:.1e}, eager {eager[error]:.1e}")
            if not exact and row["dw_row_err"] is not None and row["coefficients"] == "ones":
                line(row["dw_row_err"] <= 0.15, f"{what}: dw_row_err {row['dw_row_err']:.3f}, at most 0.15")
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def _figure(title: str, note: str, panels: int, height: float = 4.6, rows: int = 1):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2 * panels, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold", color="#15181e")
    figure.supxlabel(note, x=0.012, ha="left", fontsize=8, color="#5d6673")
    axes = figure.subplots(rows, panels, squeeze=False).ravel()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e6e9ee", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def pictures(folder: Path, rows: list[dict], note: str) -> list[Path]:
    """head.png: time and memory against T (without several lengths: bars). head_errors.png: error against time."""
    long = [r for r in rows if r["inputs"].startswith("lengths") and r["ms"]]
    drawn = [_against_length(folder / "head.png", long, note) if long else _bars(folder / "head.png", rows, note)]
    swept = [
        r for r in rows if r["eps"] and r["coefficients"] == "ones" and r["ms"] and r["op"] == "linear_weighted_nll"
    ]
    swept = [r for r in swept if r["dw_row_err"] is not None]
    if any(r["key"] in SWEEP for r in swept):
        drawn.append(_errors(folder / "head_errors.png", rows, swept, note))
    return drawn


def _bars(path: Path, rows: list[dict], note: str) -> Path:
    from . import harness

    inputs = rows[0]["inputs"] if rows else ""
    here = [r for r in rows if r["inputs"] == inputs and r["coefficients"] == "ones" and r["ms"]]
    here = [r for r in here if r["key"] not in SWEEP]  # those are in head_errors.png
    here = [r | {"impl": label(r)} for r in here]
    panels = [("ms (less is better)", here, "ms", ",.0f"),
              ("workspace, MB (less is better)", here, "workspace_mb", ",.0f")]  # fmt: skip
    return harness.bar_picture(path, f"The vocabulary head, forward and backward, {inputs}", panels, note)


def _against_length(path: Path, rows: list[dict], note: str) -> Path:
    from matplotlib.ticker import FuncFormatter

    shape = f"V = {rows[0]['V']:,}, H = {rows[0]['H']:,}"
    figure, axes = _figure("The vocabulary head, forward and backward, against the length", f"{shape}; {note}", 2, 5.2)
    marks = {"gemms": ("--", ""), "eager": ("-", "s")}
    for ax, key, label, scale in (
        (axes[0], "ms", "seconds", 1e-3),
        (axes[1], "workspace_mb", "workspace and saved tensors, MB", 1),
    ):
        for name in COLOURS:
            line = sorted((r["T"], r[key] * scale) for r in rows if r["key"] == name)
            if line and not (name == "gemms" and key == "workspace_mb"):
                style, mark = marks.get(name, ("-", "o"))
                title = next(r for r in rows if r["key"] == name)
                text = title["impl"] + (f", {title['op']}" if title["impl"].startswith("longtrace") else "")
                ax.plot(*zip(*line), style, marker=mark, markersize=4, color=COLOURS[name], label=text)
        lengths = sorted({r["T"] for r in rows})
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
        for axis in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
            axis(FuncFormatter(lambda v, _: f"{v:,.6g}" if f"{v:.0e}"[0] in "125" else ""))
        ax.tick_params(axis="y", which="minor", labelsize=8)
        ax.set_xlabel("T, tokens")
        ax.set_ylabel(label)
    axes[0].legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2)
    figure.savefig(path)
    return path


def _errors(path: Path, rows: list[dict], swept: list[dict], note: str) -> Path:
    cases = list(dict.fromkeys(r["inputs"] for r in swept if r["key"] in SWEEP))
    figure, axes = _figure("Compressed gradients: error against time", note, len(cases), 5.2)
    colours = {16: "#9aa4b2", 64: "#2f6fde", 128: "#1f9d6b"}
    for ax, inputs in zip(axes, cases):
        for rank in sorted({r["rank"] for r in swept}):
            line = sorted((r for r in swept if (r["inputs"], r["rank"]) == (inputs, rank)), key=lambda r: r["eps"])
            if not line:
                continue
            x, y = [r["ms"] for r in line], [r["dw_row_err"] for r in line]
            ax.plot(x, y, "-o", markersize=5, color=colours.get(rank, "#15181e"), label=f"k = {rank}")
            for row in line:
                text = f"2$^{{{round(math.log2(row['eps']))}}}$"
                ax.annotate(text, (row["ms"], row["dw_row_err"]), (4, 5), textcoords="offset points", fontsize=8)
        for key, text in (("exact", "exact"), ("gemms", "three GEMMs"), ("eager", "eager")):
            if (row := at(rows, inputs, key)) and row["ms"]:
                ax.axvline(
                    row["ms"], color=COLOURS[key], linestyle=":", linewidth=1.4, label=f"{text}: {row['ms']:,.0f} ms"
                )
        ax.set_yscale("log")
        ax.set_title(inputs, loc="left", fontsize=10, color="#5d6673")
        ax.set_xlabel("ms, forward and backward (labels: eps)")
        ax.set_ylabel("median relative error of dropped dW rows")
        ax.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    figure.savefig(path)
    return path
