"""`longtrace demo`: a reasoning model from nothing, in minutes, on a laptop's processor.

A tiny Llama starts from random weights and learns chains of arithmetic from the traces of a careless teacher, whose every
seventh step is wrong (the cold start). A control, the same model with the same number of steps, learns the same problems
from right answers alone. Then reinforcement learning rewards the first for right answers, and they answer held-out problems.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table

from . import report, tasks, traces, train
from .checkpoint import write_atomic
from .config import Refusal, SFTConfig, to_yaml
from .evaluate import solved_rate
from .grpo import GRPOConfig, grpo
from .model import choose_device, load_for_generation

console = Console()

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""The demo's chat template: it keeps the thought."""


@dataclass(kw_only=True)
class DemoConfig:
    """Train a tiny reasoning model from nothing, in minutes: traces first, then rewards."""

    out: Path = Path("runs/demo")
    """Folder for the models, summary.json and report.html; an earlier demo in it is replaced."""
    quick: bool = False
    """Less training, a shorter control and a lower bar, in under a minute: for continuous integration."""
    seed: int = 0
    """Seeds the weights, the problems and their order."""
    base_only: bool = False
    """Only make the untrained model and its tokenizer, in OUT/base: where the pipelines of examples/ begin."""


@dataclass(frozen=True)
class Recipe:
    """What the demo trains, and the bar it holds itself to. Found by experiment: docs/tasks.md tells how."""

    steps_of_a_chain: int = 8
    errors: float = 0.15  # of the teacher's steps: 0.85^8 = 27 % of its traces end right
    optimizer_steps: int = 1000
    tokens_per_row: int = 704  # eight chains
    problems: int = 9600
    held_out: int = 300
    lr: float = 3e-3
    control_steps: int = 1000
    rl_steps: int = 80
    rl_prompts: int = 16
    rl_lr: float = 3e-4
    bar_sft: tuple[float, float] = (0.15, 0.45)
    bar_rl: float = 0.7
    bar_control: float = 0.3
    bar_untrained: float = 0.05

    def data(self, seed: int, split: str = "train", style: str = "concise", errors: float = 0.0) -> str:
        rows = self.problems if split == "train" else self.held_out
        spec = f"generated:chain,steps={self.steps_of_a_chain},modulus=10,rows={rows},split={split}"
        spec += f",errors={errors}" if errors else ""
        return spec + (f",seed={seed}" if seed else "") + (f",style={style}" if style != "concise" else "")

    @property
    def max_new_tokens(self) -> int:
        return 10 * self.steps_of_a_chain + 20


FULL = Recipe()
QUICK = Recipe(
    errors=0.0, optimizer_steps=760, tokens_per_row=528, problems=4320, held_out=100, control_steps=100, rl_steps=15,
    bar_sft=(0.3, 1.0), bar_rl=0.3,
)  # fmt: skip
"""A teacher without errors, who is learned from sooner, and fewer steps: about a minute, with bars that any seed clears."""


def make_tokenizer(specs: list[str]):
    """A byte-level BPE tokenizer learned from generated rows: digits stand alone, any text can be written."""
    return learn_tokenizer(
        text for spec in specs for row in tasks.rows(spec) for text in (row["problem"], row["trace"])
    )


def learn_tokenizer(texts: Iterable[str], alone: str = r"\n?\d+\. |\d|</?think>"):
    """A byte-level BPE tokenizer learned from texts; what matches `alone` is never merged with what stands beside it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(alone), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=512, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    bpe.add_special_tokens(["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"])
    bpe.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>", chat_template=TEMPLATE
    )


def make_model(tokenizer, seed: int):
    """A Llama of about 0.4M parameters with random weights (fp32)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=8,
            intermediate_size=256,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.06,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


# ---------------------------------------------------------------------------------------------------------------------
# the demo, top to bottom


def demo(config: DemoConfig) -> dict:
    """Runs the demo, leaves OUT/{base,sft,control,rl}, OUT/summary.json and OUT/report.html, and returns the summary;
    with `base_only` leaves OUT/base alone.

    Raises Refusal when OUT holds something else, and SystemExit(1) when the trained model misses the recipe's bar.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a model this small a second thread waits more than it computes
    try:
        return _demo(config)
    finally:
        torch.set_num_threads(threads)


def _demo(config: DemoConfig) -> dict:
    began = time.perf_counter()
    recipe = QUICK if config.quick else FULL
    out = _fresh_folder(config)
    held_out = list(traces.read_rows(recipe.data(config.seed, "test")))
    device = choose_device("auto")

    def solve(folder: Path) -> dict:
        model, tokenizer = load_for_generation(str(folder), device)
        torch.manual_seed(0)
        return solved_rate(
            model, tokenizer, held_out, max_new_tokens=recipe.max_new_tokens, batch_size=len(held_out), temperature=1.0
        )

    def learn(name: str, data: str, steps: int) -> train.RunResult:
        return train.sft(
            SFTConfig(
                model=str(out / "base"),
                data=[data],
                out=out / name,
                max_tokens=256,
                tokens_per_row=recipe.tokens_per_row,
                steps=steps,
                lr=recipe.lr,
                warmup=0.05,
                dtype="fp32",
                activation_checkpointing="off",
                seed=config.seed,
            )
        )

    _heading(1, "A language model from nothing")
    tokenizer = make_tokenizer([recipe.data(config.seed, style=style) for style in ("concise", "answer")])
    model = make_model(tokenizer, config.seed)
    model.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    parameters = sum(p.numel() for p in model.parameters())
    if config.base_only:
        console.print(f"a Llama with {parameters:,} random weights: {out / 'base'}", markup=False, soft_wrap=True)
        return {"parameters": parameters}
    example = held_out[0]
    console.print(
        f"A Llama with {parameters:,} random weights, and problems such as this one, which it has not seen:\n"
    )
    console.print(Padding(escape(example.raw["problem"]), (0, 4)), style="cyan", highlight=False)
    rates = {"untrained": solve(out / "base")}
    console.print(f"\nIt solves {_percent(rates['untrained'])} of {recipe.held_out} held-out problems.")

    _heading(2, f"The cold start: {recipe.problems:,} traces of a careless teacher")
    console.print(
        f"{100 * recipe.errors:.0f} % of its steps are wrong, so {100 * (1 - recipe.errors) ** recipe.steps_of_a_chain:.0f} % of "
        "its traces end right, and so will what learns from them."
    )
    runs = {"sft": learn("sft", recipe.data(config.seed, errors=recipe.errors), recipe.optimizer_steps)}
    rates["sft"] = solve(out / "sft")

    _heading(3, "The control: the same problems, right answers only")
    console.print(
        f"The same weights to begin with, and {recipe.control_steps:,} steps of the same size. Now it never sees the working."
    )
    train.console.quiet = True  # audit and plan would only say the same again
    try:
        runs["control"] = learn("control", recipe.data(config.seed, style="answer"), recipe.control_steps)
    finally:
        train.console.quiet = False
    rates["control"] = solve(out / "control")

    _heading(4, "Reinforcement learning: rewarded for right answers")
    console.print(
        f"{recipe.rl_steps} steps of GRPO from the cold start: {recipe.rl_prompts} problems a step, 8 tries at each, and no more "
        "teacher."
    )
    runs["rl"] = grpo(
        GRPOConfig(
            model=str(out / "sft"),
            data=[recipe.data(config.seed)],
            out=out / "rl",
            max_tokens=256,
            tokens_per_row=2048,
            max_new_tokens=recipe.max_new_tokens,
            prompts_per_rollout=recipe.rl_prompts,
            steps=recipe.rl_steps,
            lr=recipe.rl_lr,
            schedule="constant",
            warmup=0,
            dtype="fp32",
            activation_checkpointing="off",
            seed=config.seed,
        )
    )
    rates["rl"] = solve(out / "rl")

    seconds = {name: sum(step["dt"] for step in run.metrics) for name, run in runs.items()}
    tokens = {name: sum(step["tokens"] for step in run.metrics) for name, run in runs.items()}
    command = (
        f"longtrace evaluate --model {out / 'rl'} --data {recipe.data(config.seed, 'test')} "
        f"--max-new-tokens {recipe.max_new_tokens} --temperature 1 --batch-size {recipe.held_out}"
    )
    summary = {
        **{f"solved_rate_{name}": result["solved_rate"] for name, result in rates.items()},
        **{f"ci_{name}": [result["ci_low"], result["ci_high"]] for name, result in rates.items()},
        **{f"cut_off_{name}": result["cut_off"] for name, result in rates.items()},
        "held_out": recipe.held_out,
        "seconds": time.perf_counter() - began,
        "train_seconds": seconds["sft"],
        "train_seconds_control": seconds["control"],
        "train_seconds_rl": seconds["rl"],
        "train_tokens": tokens["sft"],
        "train_tokens_control": tokens["control"],
        "tokens_per_s": tokens["sft"] / seconds["sft"],
        "optimizer_steps": recipe.optimizer_steps,
        "rl_steps": recipe.rl_steps,
        "generated_tokens": sum(step["generated"] for step in runs["rl"].metrics),
        "parameters": parameters,
        "quick": config.quick,
        "evaluate": command,
    }
    write_atomic(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    page = _write_page(out, recipe, summary, rates, runs)

    _heading(5, "What traces and rewards buy")
    console.print(_rates_table(rates))
    shown = next((s for s in rates["rl"]["samples"] if s["solved"]), rates["rl"]["samples"][0])
    console.print("\nOne of its solutions, as it wrote it:\n")
    console.print(Padding(escape(shown["completion"]), (0, 4)), style="cyan", highlight=False)
    console.print(
        f"\n{parameters:,} weights, {tokens['sft'] / 1e6:.2f}M tokens in {seconds['sft']:.0f} s of fine-tuning "
        f"({summary['tokens_per_s']:,.0f} tokens/s), {seconds['rl']:.0f} s of reinforcement learning; "
        f"{summary['seconds']:.0f} s in all.\n"
    )
    _print_next(out, page, command)
    _hold_to(recipe, summary)
    return summary


def _fresh_folder(config: DemoConfig) -> Path:
    """The folder, emptied of an earlier demo; whatever else it holds is refused."""
    marker = config.out / "demo.yaml"
    if config.base_only and any((config.out / name).exists() for name in ("sft", "control", "rl")):
        raise Refusal(
            f"--out {config.out}: holds a whole demo, which --base-only would take away; accepted: another folder"
        )
    if marker.is_file():
        for name in ("base", "sft", "control", "rl"):
            shutil.rmtree(config.out / name, ignore_errors=True)
    elif config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise Refusal(f"--out {config.out}: holds something other than a demo; accepted: a new or empty folder")
    config.out.mkdir(parents=True, exist_ok=True)
    write_atomic(marker, to_yaml(config))
    return config.out


def _hold_to(recipe: Recipe, summary: dict) -> None:
    """Ends with 1 when a rate misses the recipe's bar: the demo is a test of the whole trainer too."""
    expected = {
        "untrained": (0.0, recipe.bar_untrained),
        "control": (0.0, recipe.bar_control),
        "sft": recipe.bar_sft,
        "rl": (recipe.bar_rl, 1.0),
    }
    rates = {name: summary[f"solved_rate_{name}"] for name in expected}
    missed = [
        f"{name} {rates[name]:.1%}, {low:.0%} to {high:.0%} expected"
        for name, (low, high) in expected.items()
        if not low <= rates[name] <= high
    ]
    if missed:
        console.print(f"[red]the demo missed its bar:[/] {'; '.join(missed)}")
        raise SystemExit(1)


# ---------------------------------------------------------------------------------------------------------------------
# how it is told

_NAMES = {
    "untrained": "untrained",
    "control": "trained on answers only",
    "sft": "trained on traces",
    "rl": "and rewarded for right answers",
}


def _percent(result: dict) -> str:
    return f"{100 * result['solved_rate']:.1f} %"


def _heading(number: int, title: str) -> None:
    console.print()
    console.print(Rule(f"[bold]{number}. {title}[/]", align="left", style="dim"))


def _rates_table(rates: dict[str, dict]) -> Table:
    """The rates, each with a bar and its interval; fits 80 columns."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, label in _NAMES.items():
        result = rates[name]
        filled = round(16 * result["solved_rate"])
        colour = "green" if name == "rl" else "yellow"
        table.add_row(
            label,
            f"[{colour}]{'█' * filled}[/][dim]{'·' * (16 - filled)}[/]",
            f"[bold]{_percent(result):>7}[/]",
            f"[dim]{100 * result['ci_low']:.0f} to {100 * result['ci_high']:.0f} %[/]",
        )
    return table


def _print_next(out: Path, page: Path, command: str) -> None:
    def show(what: str, line: str) -> None:
        console.print(f"[bold]{what}[/]")
        console.print(f"  {line}\n", markup=False, highlight=False, soft_wrap=True)

    show("The story with pictures", str(page))
    show("Ask the saved model again", command)
    show(
        "Next: your own model on your own traces",
        "longtrace sft --model MODEL --data traces.jsonl --out runs/mine    (longtrace prepare --audit-only looks first)",
    )


def _write_page(out: Path, recipe: Recipe, summary: dict, rates: dict[str, dict], runs: dict) -> Path:
    """OUT/report.html: the three rates, what each model wrote to the same problem, and how they learned."""
    pairs = enumerate(zip(rates["rl"]["samples"], rates["sft"]["samples"]))
    first = next((i for i, (rewarded, cold) in pairs if rewarded["solved"] and not cold["solved"]), 0)
    problem = rates["rl"]["samples"][first]["problem"]
    wrong = next((s for s in rates["rl"]["samples"] if not s["solved"]), None)

    def rewards(ax) -> None:
        report.curve(ax, *report.column(runs["rl"].metrics, "reward_accuracy"), report.BLUE, smooth=True)
        ax.set_ylim(0, 1.02)

    def losses(ax) -> None:
        for name, colour in (("sft", report.BLUE), ("control", report.ORANGE)):
            steps = runs[name].metrics
            ax.plot(
                [s["step"] for s in steps], [s["loss"] for s in steps], color=colour, label=_NAMES[name], linewidth=1
            )
        ax.set_yscale("log")
        ax.minorticks_off()
        ax.yaxis.set_major_formatter(lambda value, _: report.number_text(float(value)))
        ax.set_xlabel("step")
        ax.legend()

    transcripts = "".join(
        report.transcript(
            _NAMES[name].capitalize(),
            problem,
            sample["completion"],
            verdict=sample["solved"],
            detail="cut off" if sample["cut_off"] else f"{sample['tokens']} tokens; the answer is {sample['answer']}",
        )
        for name in ("rl", "sft", "control", "untrained")
        for sample in [rates[name]["samples"][first]]
    )
    if wrong:
        detail = f"{wrong['tokens']} tokens; the answer is {wrong['answer']}"
        transcripts += report.transcript(
            "Rewarded, where it failed", wrong["problem"], wrong["completion"], verdict=False, detail=detail
        )
    order, trained = list(_NAMES), ("sft", "control", "rl")
    tokens = {name: sum(step["tokens"] for step in runs[name].metrics) for name in trained}
    seconds = {name: sum(step["dt"] for step in runs[name].metrics) for name in trained}
    sections = [
        report.Section(
            "Solved",
            report.bars(
                [_NAMES[name] for name in order],
                [rates[name]["solved_rate"] for name in order],
                intervals=[(rates[name]["ci_low"], rates[name]["ci_high"]) for name in order],
                percent=True,
                highlight=order.index("rl"),
                title=f"Share of {recipe.held_out} held-out problems solved, sampled at temperature 1",
                caption="Lines: 95 % Wilson intervals. No test problem can be a training problem: a hash of its text decides.",
            ),
            f"Chains of {recipe.steps_of_a_chain} operations modulo 10; every operation is a bijection, so a guess is right once "
            "in ten times and the end depends on every step.",
        ),
        report.Section("What they write", transcripts, "The first held-out problem on which they differ."),
        report.Section(
            "How they learned",
            report.chart(losses, title="Loss a supervised token, logarithmic", size=(9.2, 2.8))
            + report.chart(rewards, title="Share of right answers in reinforcement learning", size=(9.2, 2.8)),
            "What learns from the careless teacher learns its errors too: its loss stays at their entropy. The control soon writes the words around the answer, and then guesses: its loss stays where a guess leaves it.",
        ),
        report.Section(
            "The run",
            report.table(
                ["", "traces", "answers only", "rewards"],
                [
                    ["optimizer steps", recipe.optimizer_steps, recipe.control_steps, recipe.rl_steps],
                    ["passes over the problems", *(round(runs[n].metrics[-1]["epoch"], 2) for n in trained)],
                    ["tokens", *(tokens[n] for n in trained)],
                    ["seconds", *(seconds[n] for n in trained)],
                    ["completions cut off", *(summary[f"cut_off_{n}"] for n in trained)],
                ],
            )
            + report.paragraph(f"Ask the saved model again: {summary['evaluate']}"),
            "Full reports of the runs: sft/report.html, control/report.html, rl/report.html.",
        ),
    ]
    return report.write_report(
        out,
        title="What traces and rewards buy",
        kicker="longtrace demo" + (" --quick" if summary["quick"] else ""),
        lead=(
            f"A Llama with {summary['parameters']:,} weights learned chain arithmetic from nothing. Shown the working of a teacher "
            f"who errs in {100 * recipe.errors:.0f} % of the steps, it solves {_percent(rates['sft'])} of new problems; shown right "
            f"answers alone, {_percent(rates['control'])}. Rewarded for right answers it came from the first to "
            f"{_percent(rates['rl'])} in {report.duration_text(summary['train_seconds_rl'])}."
        ),
        tiles=[
            report.Tile(_NAMES[name].capitalize(), _percent(rates[name]), f"of {recipe.held_out} held-out problems")
            for name in order
        ],
        sections=sections,
    )
