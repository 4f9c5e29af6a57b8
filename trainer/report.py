"""Reports: one self-contained HTML page per run: pictures inline as SVG, light and dark, no network, no script."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib
import yaml
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from longtrace.trainer.config import SFTConfig

# Colours to draw with: placeholders that become CSS variables in the page, so one picture serves both themes.
INK, MUTED, GRID, SURFACE, BLUE, ORANGE, GREEN, RED = (f"#{digit}0{digit}0{digit}0" for digit in "12345678")
_PLACEHOLDER = re.compile(r"(?<=: )#(?P<d>[1-8])0(?P=d)0(?P=d)0")
_VARIABLE = dict(zip("12345678", ["ink", "muted", "grid", "surface", "blue", "orange", "green", "red"]))

_STYLE = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font and can be selected
    "text.parse_math": False,  # a dollar sign in a user's label is a dollar sign
    "font.size": 9,
    "text.color": MUTED,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.labelcolor": "#101010",  # INK
    "figure.facecolor": "none",
}


@dataclass
class Section:
    """One part of the page. `body` is HTML made by the functions below (they escape what they are given)."""

    title: str
    body: str
    note: str = ""


@dataclass
class Tile:
    """One headline number: `value` is shown large, `detail` small below it."""

    label: str
    value: str
    detail: str = ""


# ----------------------------------------------------------------------------------------------------------------------
# Pieces of a page: each takes plain values and returns HTML, everything escaped


def paragraph(text: str) -> str:
    """One paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; columns of numbers are set right-aligned. Columns that do not fit scroll inside the table, never the page."""

    def cell(value: object, right: bool) -> str:
        text = number_text(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
        return f"<td{' class=n' if right else ''}>{escape(text)}</td>"

    rows = [list(row) for row in rows]
    right = [all(_is_number(row[i]) or row[i] == "" for row in rows) and bool(rows) for i in range(len(columns))]
    head = "".join(f"<th{' class=n' if r else ''}>{escape(column)}</th>" for column, r in zip(columns, right))
    body = "".join(f"<tr>{''.join(map(cell, row, right))}</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def chart(
    draw: Callable[[Axes], None], *, title: str, caption: str = "", size: tuple[float, float] = (5.4, 2.7)
) -> str:
    """An inline SVG picture: `draw(axes)` draws with matplotlib, in this module's colours; `size` in inches."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):  # ids depend on the title only: same run, same bytes
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r' id="[A-Za-z0-9.]+_\d+"', "", svg
    )  # figure_1, axes_1: repeated in every picture and never referred to
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = _PLACEHOLDER.sub(lambda match: f"var(--{_VARIABLE[match[1]]})", svg)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', r"<svg \1\2", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"([^>]*?)height="[^"]*"', r"<svg \1\2", svg, count=1)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
    note = f"<p class=caption>{escape(caption)}</p>" if caption else ""
    wide = " class=wide" if size[0] > 7 else ""
    return f"<figure{wide}><figcaption>{escape(title)}</figcaption><div>{svg}</div>{note}</figure>"


def bars(
    labels: Sequence[str],
    values: Sequence[float],
    *,
    title: str,
    caption: str = "",
    intervals: Sequence[tuple[float, float]] | None = None,
    percent: bool = False,
    highlight: int | None = None,
) -> str:
    """Horizontal bars with the value written at each, optional (low, high) intervals, one bar set apart by colour.

    `percent=True` takes rates in [0, 1] and draws the axis from 0 to 100 %.
    """

    def draw(ax: Axes) -> None:
        places = range(len(labels))
        colours = [BLUE if highlight is None or i == highlight else MUTED for i in places]
        ax.barh(places, values, color=colours, height=0.58)
        for i, value in enumerate(values):
            low, high = intervals[i] if intervals else (value, value)
            if high > low:
                ax.plot([low, high], [i, i], color=INK, linewidth=1.4)
                ax.plot([low, high], [i, i], linestyle="none", marker="|", markersize=6, color=INK)
            text = f"{100 * value:.1f} %" if percent else number_text(value)
            ax.annotate(
                text, (max(high, value), i), (6, 0), textcoords="offset points", va="center", color=INK, size=10
            )
        ax.set_yticks(places, labels, color=INK)
        ax.invert_yaxis()
        ax.grid(False, axis="y")
        ax.grid(True, axis="x")
        ax.tick_params(axis="x", length=0)
        ax.spines["bottom"].set_visible(False)
        if percent:
            ax.set_xlim(0, 1.12)
            ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
        else:
            ax.set_xlim(0, 1.2 * max([*values, 1e-9]))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))

    return chart(draw, title=title, caption=caption, size=(9.2, 0.6 + 0.45 * max(1, len(labels))))


def side_by_side(*pieces: str) -> str:
    """Pieces in two columns where the window is wide enough, else below one another."""
    return f"<div class=pair>{''.join(pieces)}</div>"


def transcript(title: str, prompt: str, completion: str, *, verdict: bool | None = None, detail: str = "") -> str:
    """A prompt with what the model wrote, the thought set apart from the answer, folded when long."""
    badge = (
        ""
        if verdict is None
        else f" <b class={'good' if verdict else 'bad'}>{'solved' if verdict else 'not solved'}</b>"
    )
    thought, closing, answer = completion.partition("</think>")
    if closing:
        written = f"<span class=thought>{escape(thought + closing)}</span>{escape(answer)}"
    else:
        written = escape(completion)
    more = f" <span class=muted>{escape(detail)}</span>" if detail else ""
    unfolded = " open" if len(completion) < 1200 else ""
    return (
        f"<details class=transcript{unfolded}><summary>{escape(title)}{badge}{more}</summary>"
        f"<pre class=prompt>{escape(prompt)}</pre><pre>{written}</pre></details>"
    )


def write_report(
    out: Path,
    *,
    title: str,
    sections: Sequence[Section],
    tiles: Sequence[Tile] = (),
    kicker: str = "longtrace",
    lead: str = "",
) -> Path:
    """Write the page to `out` (a file ending in .html, or a folder that gets report.html) and return its path.

    The file is written beside and renamed, so a reader never sees half of it.
    """
    out = Path(out)
    path = out if out.suffix == ".html" else out / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    boxes = "".join(
        f"<div class=tile><span>{escape(t.label)}</span><strong>{escape(t.value)}</strong>"
        f"<small>{escape(t.detail)}</small></div>"
        for t in tiles
    )
    parts = "".join(
        f"<section><h2>{escape(s.title)}</h2>"
        f"{f'<p class=note>{escape(s.note)}</p>' if s.note else ''}{s.body}</section>"
        for s in sections
    )
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>\n<body><main>"
        f"<header><p class=kicker>{escape(kicker)}</p><h1>{escape(title)}</h1>"
        f"{f'<p class=lead>{escape(lead)}</p>' if lead else ''}</header>"
        f"{f'<div class=tiles>{boxes}</div>' if boxes else ''}\n{parts}</main></body></html>\n"
    )
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # A trace may hold a lone surrogate, which UTF-8 cannot carry: it becomes a question mark here, nothing else does.
    beside.write_bytes(page.encode("utf-8", errors="replace"))
    os.replace(beside, path)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# How numbers are written


def number_text(value: float) -> str:
    """Three or four significant digits, thousands separated: 15,360 · 0.0123 · 1e-05."""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:.4g}"


def short_count(value: float) -> str:
    """A count in words of three digits: 980 · 15.4k · 2.1M."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def duration_text(seconds: float) -> str:
    """4.2 s · 7m 20s · 3h 05m."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"


def _is_number(value: object) -> bool:
    return bool(re.fullmatch(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?( ?%)?|nan|inf", str(value)))


# ----------------------------------------------------------------------------------------------------------------------
# The report of a training run


def read_metrics(path: Path) -> tuple[list[dict], int]:
    """The steps of a metrics.jsonl and how many of its lines could not be read (a killed run may leave half a line)."""
    steps, unreadable = [], 0
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if not line.strip():
                continue
            try:
                step = json.loads(line)
            except json.JSONDecodeError:
                step = None
            if isinstance(step, dict):
                steps.append(step)
            else:
                unreadable += 1
    return steps, unreadable


def settings(out: Path) -> list[Section]:
    """The sections on a run's config.yaml and environment.json, where they are there."""
    config = read_mapping(out / "config.yaml", yaml.safe_load)
    environment = read_mapping(out / "environment.json", json.loads)
    note = "Marked: what this run set differently from the defaults."
    return [
        *([Section("Configuration", config_table(config), note)] if config else []),
        *([Section("Environment", table(["what", "value"], flat_rows(environment)))] if environment else []),
    ]


def sft_report(
    out: Path, *, lengths: Sequence[int] | None = None, title: str = "", extra: Sequence[Section] = ()
) -> Path:
    """Write OUT/report.html from the run folder's metrics.jsonl, audit.json, config.yaml and environment.json.

    Whatever is missing is left out of the page. `lengths` (tokens per document) draws the length histogram; `extra`
    sections come after the curves. Called after every evaluation and at the end, so it also tells of a run under way.
    """
    out = Path(out)
    steps, unreadable = read_metrics(out / "metrics.jsonl")
    config = read_mapping(out / "config.yaml", yaml.safe_load)
    audit = read_mapping(out / "audit.json", json.loads)
    clip = config.get("clip") or None

    sections = [Section("Training", _training(steps, clip), unreadable_note(unreadable))]
    if steps:
        sections.append(Section("Speed", speed(steps)))
    sections += list(extra)
    data = _data(steps, lengths if lengths is not None else audit.get("lengths"), audit)
    if data:
        sections.append(Section("Data", data))
    sections += settings(out)
    return write_report(
        out,
        title=title or f"Fine-tuning {Path(str(config.get('model', out.resolve().name))).name}",
        kicker=f"longtrace sft · {out.resolve().name}",
        lead=_lead(steps),
        tiles=_tiles(steps),
        sections=sections,
    )


def read_mapping(path: Path, parse: Callable[[str], object]) -> dict:
    """A file's mapping; empty when there is none yet."""
    if not path.is_file():
        return {}
    value = parse(path.read_text(encoding="utf-8", errors="replace"))
    return value if isinstance(value, dict) else {}


def column(steps: list[dict], name: str) -> tuple[list[float], list[float]]:
    """(step numbers, values) where the metric was recorded as a finite number."""
    pairs = [(s.get("step", i + 1), s[name]) for i, s in enumerate(steps) if isinstance(s.get(name), (int, float))]
    pairs = [(x, y) for x, y in pairs if math.isfinite(y)]
    return [x for x, _ in pairs], [y for _, y in pairs]


def settled(values: list[float]) -> list[float]:
    """Without the first step, which pays for warming up, when there are others."""
    return values[1:] if len(values) > 1 else values


def steps_text(steps: list[dict]) -> str:
    return f"{len(steps):,} step{'' if len(steps) == 1 else 's'}"


def _lead(steps: list[dict]) -> str:
    losses = column(steps, "loss")[1]
    if not losses:
        return "No step has finished yet."
    tokens, seconds = sum(column(steps, "tokens")[1]), sum(column(steps, "dt")[1])
    text = f"{steps_text(steps)} over {short_count(tokens)} tokens in {duration_text(seconds)}: "
    if len(losses) == 1:
        return text + f"loss {losses[0]:.4f}."
    return text + f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}."


def _tiles(steps: list[dict]) -> list[Tile]:
    tiles = []
    if losses := column(steps, "loss")[1]:
        tiles.append(Tile("Loss", f"{losses[-1]:.4f}", f"from {losses[0]:.4f}" if len(losses) > 1 else "first step"))
    if evals := column(steps, "eval_loss")[1]:
        tiles.append(Tile("Eval loss", f"{evals[-1]:.4f}", f"best {min(evals):.4f}, from {evals[0]:.4f}"))
    if rates := settled(column(steps, "tok_per_sec")[1]):
        mfu = settled(column(steps, "mfu")[1])
        detail = f"median; {100 * statistics.median(mfu):.0f} % of the matmul peak" if mfu else "median"
        tiles.append(Tile("Tokens per second", number_text(round(statistics.median(rates), 1)), detail))
    if tokens := column(steps, "tokens")[1]:
        supervised = sum(column(steps, "supervised")[1])
        detail = f"{100 * supervised / sum(tokens):.0f} % supervised" if supervised and sum(tokens) else ""
        tiles.append(Tile("Tokens", short_count(sum(tokens)), detail))
    if fill := column(steps, "fill")[1]:
        tiles.append(Tile("Packing fill", f"{100 * statistics.mean(fill):.1f} %", "of each row is tokens"))
    if seconds := column(steps, "dt")[1]:
        tiles.append(Tile("Time", duration_text(sum(seconds)), steps_text(steps)))
    return tiles


def unreadable_note(count: int) -> str:
    return f"Left out: {count} line{'s' if count > 1 else ''} of metrics.jsonl that could not be read." if count else ""


def curve(ax: Axes, x: list[float], y: list[float], colour: str, *, smooth: bool = False, label: str = "") -> None:
    """A line; with few points their markers, with many noisy ones a running mean over a faint line."""
    if smooth and len(y) >= 40:
        ax.plot(x, y, color=colour, alpha=0.25, linewidth=1)
        half = max(2, len(y) // 50)
        mean = [statistics.fmean(y[max(0, i - half) : i + half + 1]) for i in range(len(y))]
        ax.plot(x, mean, color=colour, label=label or None)
    else:
        ax.plot(x, y, color=colour, marker="o" if len(y) < 25 else None, markersize=3.5, label=label or None)
    ax.set_xlabel("step")
    if len(x) < 4:
        ax.set_xticks(x)
        ax.set_xlim(min(x, default=0) - 0.5, max(x, default=0) + 0.5)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number_text(float(value))))
    ax.margins(x=0.02)


def _training(steps: list[dict], clip: float | None) -> str:
    x, losses = column(steps, "loss")
    if not losses:
        return paragraph("No step has been recorded.")

    def draw_loss(ax: Axes) -> None:
        eval_x, evals = column(steps, "eval_loss")
        curve(ax, x, losses, BLUE, smooth=True, label="training")
        if evals:
            ax.plot(eval_x, evals, color=ORANGE, marker="o", markersize=4.5, label="held out")
            ax.legend()
        ax.set_ylabel("nats per token")

    def draw_lr(ax: Axes) -> None:
        curve(ax, *column(steps, "lr"), GREEN)
        ax.set_ylim(bottom=0)

    def draw_norm(ax: Axes) -> None:
        norm_x, norms = column(steps, "grad_norm")
        curve(ax, norm_x, norms, BLUE, smooth=True)
        ax.set_ylim(0, 1.15 * max([*norms, 1e-12]))
        if clip:
            if clip < ax.get_ylim()[1]:
                ax.axhline(clip, color=RED, linewidth=1, linestyle=(0, (4, 3)))
                ax.annotate("clip", (1, clip), (-2, 4), xycoords=("axes fraction", "data"), textcoords="offset points",
                            ha="right", color=RED)  # fmt: skip
            else:
                ax.set_title(f"clip {number_text(clip)} is above the picture", loc="right", size=9, color=MUTED)

    pictures = [chart(draw_loss, title="Loss", size=(9.2, 3.1))]
    small = []
    if column(steps, "lr")[1]:
        small.append(chart(draw_lr, title="Learning rate"))
    if column(steps, "grad_norm")[1]:
        small.append(chart(draw_norm, title="Gradient norm", caption="Before clipping."))
    return "".join(pictures) + (side_by_side(*small) if small else "")


def speed(steps: list[dict]) -> str:
    def draw(name: str, unit: str, colour: str, scale: float) -> Callable[[Axes], None]:
        def picture(ax: Axes) -> None:
            x, y = column(steps, name)
            curve(ax, x, [scale * value for value in y], colour, smooth=True)
            ax.set_ylim(0, 1.15 * max([*(scale * value for value in y), 1e-12]))
            ax.set_ylabel(unit)

        return picture

    pictures = []
    if column(steps, "tok_per_sec")[1]:
        pictures.append(chart(draw("tok_per_sec", "tokens per second", BLUE, 1), title="Throughput"))
    if column(steps, "mfu")[1]:
        note = "Model FLOPs, recomputation not counted, as a share of the matmul peak measured on this machine."
        pictures.append(chart(draw("mfu", "%", GREEN, 100), title="Model FLOP utilisation", caption=note))
    return side_by_side(*pictures)


def _data(steps: list[dict], lengths: Sequence[int] | None, audit: dict) -> str:
    pictures = []
    if lengths is not None and len(lengths):
        values = sorted(int(length) for length in lengths)
        middle, long = values[len(values) // 2], values[min(len(values) - 1, int(0.9 * len(values)))]

        def draw_lengths(ax: Axes) -> None:
            ax.hist(values, bins=min(40, max(8, len(values) // 4)), color=BLUE, rwidth=0.92)
            ax.set_xlabel("tokens in the document")
            ax.set_ylabel("documents")
            if values[0] < values[-1] / 2:
                ax.set_xlim(left=0)
            ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
            ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))

        note = f"{len(values):,} documents; median {middle:,}, 90 % up to {long:,}, longest {values[-1]:,} tokens."
        pictures.append(chart(draw_lengths, title="Document lengths", caption=note))
    if fill := column(steps, "fill")[1]:

        def draw_fill(ax: Axes) -> None:
            curve(ax, column(steps, "fill")[0], [100 * value for value in fill], GREEN)
            ax.set_ylim(0, 105)
            ax.set_ylabel("%")

        pictures.append(chart(draw_fill, title="Packing fill", caption="Share of each packed row that is tokens."))
    body = side_by_side(*pictures) if pictures else ""
    if audit:
        body += "<h3>Audit</h3>" + _audit(audit)
    return body


def _audit(audit: dict) -> str:
    """What became of every row and token, and the checks; the dictionary of `audit.Audit.as_dict`."""
    if not isinstance(audit.get("checks"), dict) or "rows_read" not in audit:
        return table(["check", "result"], flat_rows({key: value for key, value in audit.items() if key != "lengths"}))
    rows_read, tokens_read = audit["rows_read"], audit.get("tokens_read", 0)
    handled = {"refuse": "refused", "skip": "skipped", "split": "split"}.get(audit.get("on_too_long"), "")

    def line(name: str, rows: str = "", tokens: str = "") -> list[object]:
        counts = [(audit.get(rows), rows_read), (audit.get(tokens), tokens_read)]
        shares = [[n, f"{100 * n / of:.1f} %" if of else ""] if n is not None else ["", ""] for n, of in counts]
        return [name, *shares[0], *shares[1]]

    funnel = [
        line("read", "rows_read", "tokens_read"),
        line(f"over {audit.get('max_tokens', 0):,} tokens, {handled}", "rows_too_long", "tokens_too_long"),
        *([line("unreadable, left out", "rows_unreadable")] if audit.get("rows_unreadable") else []),
        *([line("failing a check, left out", "rows_left_out")] if audit.get("rows_left_out") else []),
        line("whole traces kept", "rows_whole"),
        line("kept", "", "tokens_kept"),
        line("dropped", "", "tokens_dropped"),
        line("in the loss", "", "tokens_supervised"),
    ]
    checks = []
    for check in audit["checks"].values():
        failed = check["kind"] and check["passed"] < check["applies"]
        allowed = ", allowed" if check["kind"] in audit.get("allow", []) else ""
        verdict = f"{check['kind']}{allowed}" if failed else ("ok" if check["kind"] and check["applies"] else "")
        checks.append([check["name"], check["passed"], check["applies"], verdict])
    said = [f"Template: {audit.get('template', '')}", *audit.get("notes", [])]
    said += [
        f"First: {audit[key]}" for key in ("first_unreadable", "first_too_long", "first_left_out") if audit.get(key)
    ]
    return (
        table(["", "rows", "", "tokens", ""], funnel)
        + table(["check", "rows", "of", ""], checks)
        + "".join(f"<p class=caption>{escape(str(text))}</p>" for text in said)
    )


def flat_rows(value: dict, prefix: str = "") -> list[tuple[str, object]]:
    """Rows (dotted name, value) of nested mappings; lists are joined, long ones cut with the number left out."""
    rows: list[tuple[str, object]] = []
    for key, item in value.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(item, dict):
            rows += flat_rows(item, f"{name} · ")
        elif isinstance(item, (list, tuple)):
            shown = ", ".join(str(part) for part in item[:8])
            rows.append((name, shown + (f" … {len(item) - 8} more" if len(item) > 8 else "")))
        elif isinstance(item, bool) or item is None:
            rows.append((name, {True: "yes", False: "no", None: "–"}[item]))
        else:
            rows.append((name, item))
    return rows


def config_table(config: dict) -> str:
    defaults = {}
    for field in dataclasses.fields(SFTConfig):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()

    def entry(name: str, value: object) -> str:
        default = defaults.get(name, object())
        same = value == (list(default) if isinstance(default, tuple) else default)
        shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        return f"<div{'' if same else ' class=set'}><dt>{escape(str(name))}</dt><dd>{escape(shown) or '–'}</dd></div>"

    return f"<dl class=config>{''.join(entry(name, value) for name, value in config.items())}</dl>"


_CSS = """
:root{--page:#f6f7f9;--surface:#fff;--ink:#15181e;--muted:#5d6673;--grid:#dfe3e8;--blue:#2f6fde;--orange:#d9690f;
--green:#178a5c;--red:#cf3340;--wash:#eef3fc}
@media (prefers-color-scheme:dark){:root{--page:#101318;--surface:#181c23;--ink:#e9ecf1;--muted:#9aa4b2;--grid:#2b313b;
--blue:#6ea1ff;--orange:#f39a4d;--green:#4cc38f;--red:#ff7b84;--wash:#1e2633}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue","Noto Sans","Liberation Sans",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1040px;margin:0 auto;padding:48px 24px 72px}
header{margin-bottom:28px}
h1{font-size:34px;line-height:1.15;letter-spacing:-.02em;margin:4px 0 10px;overflow-wrap:anywhere}
h2{font-size:20px;letter-spacing:-.01em;margin:0 0 14px}
h3{font-size:15px;margin:22px 0 8px}
p{margin:0 0 12px}
.kicker{color:var(--muted);font-size:14px;margin:0;overflow-wrap:anywhere}
.lead{font-size:18px;color:var(--muted);margin:0;max-width:44em}
.note,.caption,.muted{color:var(--muted);font-size:14px}
.caption{margin:4px 0 0;font-size:13px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-bottom:20px}
.tile{background:var(--surface);border:1px solid var(--grid);border-radius:10px;padding:14px 16px;min-width:0}
.tile span,.tile small{display:block;color:var(--muted);font-size:13px;line-height:1.35}
.tile strong{display:block;font-size:23px;line-height:1.3;font-weight:650;letter-spacing:-.02em;white-space:nowrap}
section{background:var(--surface);border:1px solid var(--grid);border-radius:12px;padding:22px 24px 24px;
margin-top:20px;overflow-wrap:anywhere}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:20px 28px}
figure{margin:0 0 18px;min-width:0}
.pair figure{margin:0}
figcaption{font-size:14px;font-weight:600;margin-bottom:4px}
figure>div{overflow-x:auto}
.wide svg{min-width:560px}
svg{display:block;width:100%;height:auto}
svg text{font-family:inherit;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto;margin-bottom:14px}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th{text-align:left;color:var(--muted);font-weight:600;white-space:nowrap}
th,td{padding:6px 16px 6px 0;border-bottom:1px solid var(--grid);vertical-align:top}
tbody tr:last-child td{border-bottom:0}
td.n{white-space:nowrap;text-align:right}
th.n{text-align:right}
td{min-width:5em}
.config{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));gap:0 28px;margin:0;
font-size:14px}
.config div{display:flex;justify-content:space-between;gap:16px;padding:5px 0 5px 10px;
border-bottom:1px solid var(--grid);border-left:3px solid transparent}
.config .set{border-left-color:var(--blue)}
.config .set dd{font-weight:600}
dt{color:var(--muted);flex:none}
dd{margin:0;text-align:right;min-width:0;overflow-wrap:anywhere}
pre{margin:0;padding:14px 16px;background:var(--page);border-radius:8px;font:13px/1.55 ui-monospace,SFMono-Regular,
Menlo,Consolas,"Liberation Mono",monospace;white-space:pre-wrap;overflow-wrap:anywhere;max-height:30em;overflow-y:auto}
.prompt{background:var(--wash);margin-bottom:8px}
.thought{color:var(--muted)}
.transcript{border-top:1px solid var(--grid);padding:10px 0}
.transcript summary{cursor:pointer;font-size:15px;margin-bottom:6px}
.good,.bad{font-size:13px;padding:1px 8px;border-radius:99px;margin-left:6px;border:1px solid}
.good{color:var(--green)}.bad{color:var(--red)}
@media (max-width:560px){main{padding:28px 14px 48px}h1{font-size:27px}section{padding:18px 16px}}
@media print{body{background:#fff}section,.tile{break-inside:avoid}}
""".strip()
