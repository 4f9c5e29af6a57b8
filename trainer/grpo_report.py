"""The page of a GRPO run: R1's two curves (accuracy and length against steps), groups, the objective's health, samples."""

from __future__ import annotations

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
    number_text,
    paragraph,
    read_mapping,
    read_metrics,
    settings,
    short_count,
    side_by_side,
    steps_text,
    table,
    transcript,
    unreadable_note,
    write_report,
)

SHOWN = 8  # completions on the page


def grpo_report(out: Path) -> Path:
    """Write OUT/report.html from the run folder's metrics.jsonl, samples.jsonl, config.yaml and environment.json."""
    out = Path(out)
    steps, unreadable = read_metrics(out / "metrics.jsonl")
    samples, _ = read_metrics(out / "samples.jsonl")
    config = read_mapping(out / "config.yaml", yaml.safe_load)
    sections = [
        Section("What it learned", _learned(steps), unreadable_note(unreadable)),
        Section("Groups", _groups(steps), "Only a group whose rewards differ carries a gradient."),
        Section("The objective", _objective(steps)),
        Section("Where the time went", _time(steps)),
    ]
    if samples:
        sections.append(Section("What it writes", _samples(samples), "From the first rollout to the last."))
    sections += settings(out)
    return write_report(
        out,
        title=f"Reinforcement learning of {Path(str(config.get('model', out.resolve().name))).name}",
        kicker=f"longtrace grpo · {out.resolve().name}",
        lead=_lead(steps),
        tiles=_tiles(steps),
        sections=[section for section in sections if section.body],
    )


def _lead(steps: list[dict]) -> str:
    rewards = column(steps, "reward")[1]
    if not rewards:
        return "No rollout has been scored yet."
    seconds, written = sum(column(steps, "dt")[1]), sum(column(steps, "generated")[1])
    text = f"{steps_text(steps)} and {short_count(written)} generated tokens in {duration_text(seconds)}: "
    text += f"the mean reward went from {rewards[0]:.3f} to {rewards[-1]:.3f}"
    evals = column(steps, "eval_pass@1")[1]
    return text + (f", pass@1 on held-out problems from {evals[0]:.3f} to {evals[-1]:.3f}." if len(evals) > 1 else ".")


def _tiles(steps: list[dict]) -> list[Tile]:
    tiles = []
    for name, label in (("eval_pass@1", "Pass@1"), ("reward", "Reward"), ("completion_tokens", "Tokens a completion")):
        if values := column(steps, name)[1]:
            tiles.append(Tile(label, number_text(round(values[-1], 3)), f"from {number_text(round(values[0], 3))}"))
    if cut := column(steps, "cut_off")[1]:
        tiles.append(Tile("Cut off", f"{100 * cut[-1]:.0f} %", f"from {100 * cut[0]:.0f} %"))
    if seconds := column(steps, "dt")[1]:
        tiles.append(Tile("Time", duration_text(sum(seconds)), steps_text(steps)))
    return tiles


def _names(steps: list[dict], prefix: str) -> list[str]:
    return sorted({name for step in steps for name in step if name.startswith(prefix)})


def _lines(steps: list[dict], names: dict[str, tuple[str, str]], *, percent: bool = False, bottom: float | None = 0):
    """A drawing of several metrics: {metric: (label, colour)}."""

    def draw(ax) -> None:
        for name, (label, colour) in names.items():
            x, y = column(steps, name)
            if y:
                curve(ax, x, [100 * v if percent else v for v in y], colour, smooth=True, label=label)
        if len(names) > 1:
            ax.legend()
        if percent:
            ax.set_ylabel("%")
        if bottom is not None:
            ax.set_ylim(bottom=min(bottom, ax.get_ylim()[0]))

    return draw


def _learned(steps: list[dict]) -> str:
    if not column(steps, "reward")[1]:
        return paragraph("No rollout has been scored.")
    accuracy = {"reward_accuracy": ("training, sampled", BLUE)} if column(steps, "reward_accuracy")[1] else {}
    colours = iter((ORANGE, GREEN, RED))
    for name in (
        "eval_pass@1",
        *(n for n in _names(steps, "eval_pass@") if n != "eval_pass@1"),
        *_names(steps, "eval_cons@"),
    ):
        if column(steps, name)[1]:
            accuracy[name] = (f"held out, {name.removeprefix('eval_')}", next(colours, MUTED))
    lengths = {"completion_tokens": ("all", BLUE), "tokens_right": ("right", GREEN), "tokens_wrong": ("wrong", RED)}
    pictures = [
        chart(_lines(steps, accuracy or {"reward": ("reward", BLUE)}, percent=bool(accuracy)), title="Accuracy"),
        chart(_lines(steps, {k: v for k, v in lengths.items() if column(steps, k)[1]}), title="Tokens a completion"),
    ]
    parts = {
        name: (name.removeprefix("reward_"), c)
        for name, c in zip(_names(steps, "reward_"), (BLUE, ORANGE, GREEN, RED))
        if name != "reward_std"
    }
    more = [
        chart(_lines(steps, {"reward": ("sum", MUTED)} | parts), title="Rewards"),
        chart(_lines(steps, {"reflections": ("", BLUE)}), title="Reflection words, per 1,000",
              caption="wait, mistake, however, but, retry, error, verify, wrong, evaluate, check (R1's list)."),
    ]  # fmt: skip
    return side_by_side(*pictures) + side_by_side(*more)


def _groups(steps: list[dict]) -> str:
    names = ("groups_all_right", "groups_mixed", "groups_all_wrong")
    data = {name: column(steps, name) for name in names}
    if not data["groups_mixed"][1]:
        return ""

    def draw(ax) -> None:
        ax.stackplot(
            data["groups_mixed"][0], *(data[n][1] for n in names), colors=(GREEN, BLUE, RED),
            labels=("all right", "mixed", "all wrong"), alpha=0.75,
        )  # fmt: skip
        ax.set_xlabel("step")
        ax.margins(x=0, y=0)
        ax.legend(loc="upper left")

    return side_by_side(
        chart(draw, title="Groups of a rollout"),
        chart(_lines(steps, {"cut_off": ("", RED)}, percent=True), title="Completions cut off at the limit"),
    )


def _objective(steps: list[dict]) -> str:
    pictures = []
    for name, title, caption in (
        ("entropy", "Entropy", "Nats a token, under the policy."),
        ("grad_norm", "Gradient norm", "Before clipping."),
        ("kl", "Divergence from the reference", "As estimated by --divergence, a token."),
        ("mismatch", "Trainer's probability over the engine's", "Mean ratio, before the cap."),
    ):
        if column(steps, name)[1]:
            pictures.append(chart(_lines(steps, {name: ("", BLUE)}), title=title, caption=caption))
    if any(column(steps, "clip_high")[1]) or any(column(steps, "clip_low")[1]):
        clips = {"clip_high": ("raised", GREEN), "clip_low": ("lowered", RED)}
        pictures.append(chart(_lines(steps, clips, percent=True), title="Tokens whose ratio was clipped"))
    return "".join(side_by_side(*pictures[i : i + 2]) for i in range(0, len(pictures), 2))


def _time(steps: list[dict]) -> str:
    generating = sum(column(steps, "generate_seconds")[1])
    everything = sum(column(steps, "dt")[1])
    written, trained = sum(column(steps, "generated")[1]), sum(column(steps, "tokens")[1])
    if not everything or not generating:
        return ""
    scoring = sum(column(steps, "score_seconds")[1])
    training = max(everything - generating - scoring, 1e-9)
    rows = [
        ["generating", duration_text(generating), f"{100 * generating / everything:.0f} %", short_count(written), round(written / generating)],
        ["scoring", duration_text(scoring), f"{100 * scoring / everything:.0f} %", "", ""],
        ["training", duration_text(training), f"{100 * training / everything:.0f} %", short_count(trained), round(trained / training)],
    ]  # fmt: skip
    return table(["", "time", "share", "tokens", "tokens per second"], rows)


def _samples(samples: list[dict]) -> str:
    """Evenly spread over the run, first and last included."""
    step = max(1, (len(samples) - 1) / (SHOWN - 1)) if len(samples) > 1 else 1
    shown = sorted({min(round(i * step), len(samples) - 1) for i in range(SHOWN)})
    pieces = []
    for s in (samples[i] for i in shown):
        reward = "not scored" if s["reward"] is None else f"reward {number_text(round(float(s['reward']), 3))}"
        detail = f"{reward}, {s['tokens']:,} tokens" + (", cut off" if s["cut_off"] else "")
        pieces.append(transcript(f"Step {s['step']:,}", s["problem"], s["completion"], detail=detail))
    return "".join(pieces)
