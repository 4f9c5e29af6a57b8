"""The page of a preference run: loss and accuracy by path, rewards, what became of the log-probs, and BVPO's alpha."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from .report import (
    BLUE,
    GREEN,
    MUTED,
    ORANGE,
    RED,
    Section,
    Tile,
    chart,
    column,
    curve,
    duration_text,
    flat_rows,
    number_text,
    paragraph,
    read_mapping,
    read_metrics,
    settings,
    short_count,
    side_by_side,
    speed,
    steps_text,
    table,
    unreadable_note,
    write_report,
)

PATHS = {"": ("", BLUE), "_trace": ("trace", BLUE), "_empty": ("empty trace", GREEN)}


def prefer_report(out: Path) -> Path:
    """Write OUT/report.html from the run folder's metrics.jsonl, audit.json, config.yaml and environment.json."""
    out = Path(out)
    steps, unreadable = read_metrics(out / "metrics.jsonl")
    config = read_mapping(out / "config.yaml", yaml.safe_load)
    audits = {
        name: read_mapping(out / file, json.loads)
        for name, file in (("Training pairs", "audit.json"), ("Held-out pairs", "audit-eval.json"))
        if (out / file).exists()
    }
    sections = [
        Section("What it learned", _learned(steps), unreadable_note(unreadable)),
        Section("Rewards and log-probs", _rewards(steps)),
        Section("Two paths", _blend(steps), "g = alpha · g of traces + (1 - alpha) · g of empty traces."),
        Section("Optimisation", _optimisation(steps)),
        Section("Pairs", "".join(_audit(name, audit) for name, audit in audits.items())),
        *settings(out),
    ]
    return write_report(
        out,
        title=f"Preference optimisation of {Path(str(config.get('model', out.resolve().name))).name}",
        kicker=f"longtrace prefer · {out.resolve().name}",
        lead=_lead(steps, config),
        tiles=_tiles(steps),
        sections=[section for section in sections if section.body],
    )


def _suffixes(steps: list[dict], name: str) -> list[str]:
    """The paths a metric is told of: none by name where there is one."""
    return [suffix for suffix in PATHS if column(steps, name + suffix)[1]]


def _lead(steps: list[dict], config: dict) -> str:
    if not steps:
        return "No step has been recorded."
    kind = {"dpo": "DPO", "simpo": "SimPO"}.get(config.get("loss"), "Preference optimisation")
    if str(config.get("alpha")) in ("0", "0.0"):
        kind += " on empty traces"
    if "alpha" in steps[0]:
        kind = f"BVPO over {kind} with alpha {config.get('alpha')}"
    seconds, tokens = sum(column(steps, "dt")[1]), sum(column(steps, "tokens")[1])
    text = f"{kind}: {steps_text(steps)} and {short_count(tokens)} tokens in {duration_text(seconds)}."
    last = next((row for row in reversed(steps) if any(name.startswith("eval_accuracy") for name in row)), {})
    for suffix in _suffixes(steps, "eval_accuracy"):
        if f"eval_accuracy{suffix}" in last:
            of = f" ({PATHS[suffix][0]})" if suffix else ""
            text += (
                f" Held-out accuracy{of} {last[f'eval_accuracy{suffix}']:.3f}, 95 % from {last[f'eval_accuracy_low{suffix}']:.3f} "
                f"to {last[f'eval_accuracy_high{suffix}']:.3f}; by length alone {last[f'eval_by_length{suffix}']:.3f}."
            )
    return text


def _tiles(steps: list[dict]) -> list[Tile]:
    tiles = []
    for name, label in (("eval_accuracy", "Held-out accuracy"), ("accuracy", "Accuracy"), ("margin", "Margin")):
        for suffix in _suffixes(steps, name):
            values = column(steps, name + suffix)[1]
            of = f", {PATHS[suffix][0]}" if suffix else ""
            tiles.append(
                Tile(label + of, number_text(round(values[-1], 3)), f"from {number_text(round(values[0], 3))}")
            )
    if values := column(steps, "alpha")[1]:
        tiles.append(Tile("Alpha", number_text(round(values[-1], 3)), f"from {number_text(round(values[0], 3))}"))
    if seconds := column(steps, "dt")[1]:
        tiles.append(Tile("Time", duration_text(sum(seconds)), steps_text(steps)))
    return tiles


def _lines(steps: list[dict], lines: list[tuple[str, str, str]], *, percent: bool = False, level: float | None = None):
    """A drawing of several metrics: (name, label, colour) each; `level`: a dashed line to compare with."""

    def draw(ax) -> None:
        for name, label, colour in lines:
            x, y = column(steps, name)
            if y and name.startswith("eval_"):
                ax.plot(
                    x, [100 * v if percent else v for v in y], color=colour, marker="o", markersize=4.5, label=label
                )
            elif y:
                curve(ax, x, [100 * v if percent else v for v in y], colour, smooth=True, label=label)
        if level is not None:
            ax.axhline(100 * level if percent else level, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        if len(lines) > 1:
            ax.legend()
        if percent:
            ax.set_ylabel("%")

    return draw


def _learned(steps: list[dict]) -> str:
    if not column(steps, "loss")[1]:
        return paragraph("No step has been recorded.")
    losses = [("loss", "training", BLUE), ("eval_loss", "held out", ORANGE)]
    if _suffixes(steps, "loss_trace"):
        losses = [
            ("loss_trace", "trace", BLUE),
            ("loss_empty", "empty trace", GREEN),
            ("eval_loss", "held out", ORANGE),
        ]
    accuracy = [
        (
            name + suffix,
            ", ".join(part for part in (PATHS[suffix][0], label) if part),
            colour if name == "accuracy" else other,
        )
        for name, label in (("accuracy", "training"), ("eval_accuracy", "held out"))
        for suffix, colour, other in (("", BLUE, ORANGE), ("_trace", BLUE, ORANGE), ("_empty", GREEN, RED))
        if column(steps, name + suffix)[1]
    ]
    return side_by_side(
        chart(_lines(steps, losses), title="Loss", caption="Of a pair; ln 2 = 0.693 before the first step of DPO."),
        chart(_lines(steps, accuracy, percent=True, level=0.5), title="Accuracy",
              caption="Pairs whose chosen completion has the larger implicit reward; a tie is half."),
    )  # fmt: skip


def _rewards(steps: list[dict]) -> str:
    pictures = []
    for suffix in _suffixes(steps, "reward_chosen"):
        of = f": {PATHS[suffix][0]}" if suffix else ""
        sides = (("chosen", GREEN), ("rejected", RED))
        pictures += [
            chart(_lines(steps, [(f"reward_{side}{suffix}", side, colour) for side, colour in sides], level=0.0),
                  title=f"Implicit rewards{of}"),
            chart(_lines(steps, [(f"log_prob_{side}{suffix}", side, colour) for side, colour in sides]),
                  title=f"Log-probs a token{of}",
                  caption="Both may fall: only their difference is trained. A steep fall of the chosen ones is a warning."),
        ]  # fmt: skip
    return "".join(side_by_side(*pictures[i : i + 2]) for i in range(0, len(pictures), 2))


def _blend(steps: list[dict]) -> str:
    if not column(steps, "alpha")[1]:
        return ""
    note = "Used, and estimated with two standard errors." if column(steps, "alpha_estimate")[1] else ""
    alpha = chart(_alpha(steps), title="Alpha", caption=note, size=(9.2, 3.1))
    clipped = sum(column(steps, "path_distance_clipped")[1])
    below = f"; below 0 in {clipped:.0f} steps, where it counts as 0." if clipped else "."
    three = [("_trace", "trace", BLUE), ("_empty", "empty trace", GREEN), ("", "blend", ORANGE)]
    pictures = [
        chart(_lines(steps, lines, level=level), title=title, caption=caption)
        for lines, title, caption, level in (
            ([("grad_variance" + s, label, c) for s, label, c in three], "Variance of a step's gradient",
             "Trace of its covariance, smoothed over steps.", None),
            ([("grad_norm" + s, label, c) for s, label, c in three], "Gradient norms", "Of the paths before --path-clip, of the blend before --clip.", None),
            ([("grad_cosine", "", BLUE)], "Cosine of the two gradients", "", 0.0),
            ([("path_distance_sq", "", BLUE)], "Distance of the two gradients", f"Squared, of the paths' means{below}", 0.0),
        )
        if column(steps, lines[0][0])[1]
    ]  # fmt: skip
    return alpha + "".join(side_by_side(*pictures[i : i + 2]) for i in range(0, len(pictures), 2))


def _alpha(steps: list[dict]):
    def draw(ax) -> None:
        known = [row for row in steps if row.get("alpha_error") is not None]
        if known:
            (x, estimates), errors = column(known, "alpha_estimate"), column(known, "alpha_error")[1]
            low, high = ([max(0.0, min(1.0, a + s * 2 * e)) for a, e in zip(estimates, errors)] for s in (-1, 1))
            ax.fill_between(x, low, high, color=BLUE, alpha=0.2, linewidth=0)
            ax.plot(x, estimates, color=BLUE, linewidth=1, label="estimated")
        curve(ax, *column(steps, "alpha"), ORANGE, label="used")
        ax.set_ylim(-0.03, 1.03)
        if known:
            ax.legend()

    return draw


def _optimisation(steps: list[dict]) -> str:
    small = [
        chart(_lines(steps, [(name, "", colour)]), title=title, caption=caption)
        for name, title, caption, colour in (
            ("lr", "Learning rate", "", GREEN), ("grad_norm", "Gradient norm", "Before clipping.", BLUE),
        )
        if column(steps, name)[1]
    ]  # fmt: skip
    return side_by_side(*small) + speed(steps) if small else ""


def _audit(name: str, audit: dict) -> str:
    return f"<h3>{name}</h3>" + table(["", ""], flat_rows(audit)) if audit else ""
