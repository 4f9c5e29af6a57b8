"""A picture of one row's loss mask: the whole row as a strip, and the tokens themselves where something begins or ends."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np

from longtrace.trainer.config import Refusal
from longtrace.trainer.render import Encoded

COLUMNS, MOST_LINES = 144, 44
INK, GREY, LEARNED, CONTEXT, END = "#1c2b33", "#8a949a", "#bfe5d2", "#e9ecee", "#f6b26b"
FONT = "DejaVu Sans Mono"  # matplotlib brings it


def draw_loss_mask(encoded: Encoded, tokenizer, where: str, path: str | Path) -> None:
    """Writes the picture (PNG, SVG or PDF by the name of `path`). Refusal where the file cannot be written."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    tokens = _visible(tokenizer.batch_decode([[int(i)] for i in encoded.ids]))
    ends = _ends(encoded)
    lines = _wrap(tokens)
    marks = _marks(tokens, encoded, ends)
    shown = _choose(lines, [0, *(at for at, _ in marks), len(tokens) - 1])

    height = 2.35 + 0.2 * (len(shown) + 1)
    figure = Figure(figsize=(13, height), dpi=130, facecolor="white")
    learned, total = int(encoded.loss_mask.sum()), len(tokens)
    figure.text(0.03, 1 - 0.35 / height, "What is learned", size=15, weight="bold", color=INK, va="center")
    figure.text(
        *(0.97, 1 - 0.35 / height),
        f"{Path(where).name}   {total:,} tokens, {learned:,} in the loss ({100 * learned / total:.1f} %)",
        **dict(size=10, color=GREY, va="center", ha="right", parse_math=False),
    )
    strip = figure.add_axes((0.03, 1 - 1.25 / height, 0.94, 0.32 / height))
    _strip(strip, encoded, marks)
    legend = [Patch(color=LEARNED, label="in the loss"), Patch(color=END, label="end token, in the loss")]
    legend += [Patch(color=CONTEXT, label="context only")]
    figure.legend(
        handles=legend,
        loc="center left",
        bbox_to_anchor=(0.024, 1 - 1.78 / height),
        ncols=3,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=1.2,
    )
    text = figure.add_axes((0.03, 0.12 / height, 0.94, (height - 2.1) / height))
    _text(text, tokens, lines, shown, encoded.loss_mask, ends)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise Refusal(f"--picture {path}: {error}; accepted: a .png, .svg or .pdf in a folder that exists") from None


def _ends(encoded: Encoded) -> set[int]:
    """Positions of the end tokens that are learned: the last target of every turn that has one."""
    mask = encoded.loss_mask
    last = np.flatnonzero(mask & ~np.append(mask[1:], False))
    return {int(at) for at, end in zip(last, encoded.ends) if end is not None and encoded.ids[at] == end}


def _marks(tokens: list[str], encoded: Encoded, ends: set[int]) -> list[tuple[int, str]]:
    """(position, label) of where learning starts, thoughts end and turns end."""
    mask = encoded.loss_mask
    starts = np.flatnonzero(mask & ~np.insert(mask[:-1], 0, False))
    marks = [(int(at), "learning starts") for at in starts]
    characters = np.cumsum([len(token) for token in tokens])
    text, at = "".join(tokens), 0
    while (at := text.find("</think>", at)) >= 0:
        token = int(np.searchsorted(characters, at, side="right"))
        if mask[token]:
            marks.append((token, "</think>"))
        at += 1
    return sorted(marks + [(at, "end") for at in ends])


def _wrap(tokens: list[str]) -> list[range]:
    """Lines of whole tokens, broken at line breaks and at the width of the picture."""
    lines, start, width = [], 0, 0
    for i, token in enumerate(tokens):
        if width and width + len(token) > COLUMNS:
            lines.append(range(start, i))
            start, width = i, 0
        width += len(token)
        if token.endswith("↵"):
            lines.append(range(start, i + 1))
            start, width = i + 1, 0
    if start < len(tokens):
        lines.append(range(start, len(tokens)))
    return lines


def _choose(lines: list[range], positions: list[int]) -> list[range | int]:
    """The lines around the given tokens, in order, with the number of tokens left out (an int) between them."""
    starts = [line.start for line in lines]
    centres = sorted({int(np.searchsorted(starts, at, side="right")) - 1 for at in positions})
    reach = max(0, min(6, (MOST_LINES // len(centres) - 2) // 2))
    near = sorted({k for c in centres for k in range(c - reach, c + reach + 1) if 0 <= k < len(lines)})[:MOST_LINES]
    out: list[range | int] = []
    last = -1
    for k in near:
        if k > last + 1:
            out.append(lines[k].start - (lines[last].stop if last >= 0 else 0))
        out.append(lines[k])
        last = k
    if last < len(lines) - 1:
        out.append(lines[-1].stop - lines[last].stop)
    return out


def _strip(axes, encoded: Encoded, marks: list[tuple[int, str]]) -> None:
    total = len(encoded.ids)
    edges = np.flatnonzero(np.diff(encoded.loss_mask.astype(np.int8))) + 1
    bounds = [0, *edges.tolist(), total]
    for a, b in pairwise(bounds):
        axes.axvspan(a, b, color=LEARNED if encoded.loss_mask[a] else CONTEXT, lw=0)
    labelled = -total
    for at, label in marks:
        axes.axvline(at + (label == "end"), color=END if label == "end" else INK, lw=1.2)
        if at - labelled > 0.07 * total:
            right = at > 0.9 * total
            axes.annotate(
                *(label, (at, 1)),
                **dict(xycoords=("data", "axes fraction"), xytext=(0, 4), textcoords="offset points"),
                **dict(size=8.5, color=INK, ha="right" if right else "left", annotation_clip=False),
            )
            labelled = at
    axes.set(xlim=(0, total), ylim=(0, 1), yticks=[])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.tick_params(labelsize=8, colors=GREY, length=2)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _text(
    axes, tokens: list[str], lines: list[range], shown: list[range | int], mask: np.ndarray, ends: set[int]
) -> None:
    from matplotlib.patches import Rectangle

    axes.set(xlim=(0, COLUMNS), ylim=(len(shown), 0))
    axes.axis("off")
    for row, line in enumerate(shown):
        if isinstance(line, int):
            axes.text(0, row + 0.5, f"… {line:,} tokens …", size=8, color=GREY, va="center", style="italic")
            continue
        column = 0
        for i in line:
            token = tokens[i][: COLUMNS - column]
            colour = END if i in ends else LEARNED if mask[i] else CONTEXT
            axes.add_patch(
                Rectangle((column, row + 0.06), len(token), 0.88, facecolor=colour, edgecolor="white", lw=0.5)
            )
            axes.text(
                *(column, row + 0.53, token),
                **dict(size=10.1, family=FONT, color=INK if mask[i] else "#5d686e"),
                **dict(va="center_baseline", ha="left", parse_math=False),
            )
            column += len(token)


def _visible(texts: list[str]) -> list[str]:
    """Tokens as the picture shows them: line breaks as ↵, and a box for letters the font lacks."""
    from matplotlib import font_manager

    has = font_manager.get_font(font_manager.findfont(FONT)).get_charmap().keys()
    table = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "␍"})
    return ["".join(letter if ord(letter) in has else "□" for letter in text.translate(table)) for text in texts]
