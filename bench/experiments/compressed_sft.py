"""What do compressed head gradients change in fine-tuning? The same steps with exact and with compressed ones, in lockstep.

Both runs start from the same weights and see the same rows. Loss curves hide what a few rare tokens lose, so the
held-out loss of rare targets is measured too, and how far the AdamW updates of head and body point the same way. Two runs
drift apart by rounding alone: `--impls exact compressed eager` adds torch's bf16 head, which shows how far.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from longtrace import kernels as K
from longtrace.trainer.config import Refusal, SFTConfig
from longtrace.trainer.model import Model, load_model
from longtrace.trainer.source import IGNORE, PackedBatch, TraceSource

from .. import BenchConfig, harness, sft_throughput
from ..harness import console

RUNS = ("exact", "compressed", "eager")
HELD_OUT = 8  # rows
RARE = 0.1  # rare targets: the least frequent tokens that together make at most this share of the training targets
LR, BETAS, EPS, CLIP, WARMUP = 1e-5, (0.9, 0.95), 1e-8, 1.0, 10


def bench(config: BenchConfig) -> None:
    """Trains, prints the checks, draws compressed_sft.png, writes the record. Raises Refusal if a check fails."""
    config.steps, config.tokens = (10, 256) if config.quick else (config.steps or 300, config.tokens or 1024)
    chosen, machine = harness.begin(config, RUNS, ["compressed"])
    names = list(dict.fromkeys(["exact", *chosen]))
    threads = machine["threads"]
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="longtrace-bench-") as folder:
        path, weights = sft_throughput.model_folder(config, Path(folder))
        train, held, data = _rows(config, path)
        runs = {name: Run(name, path, config, Path(folder) / name) for name in names}
    rare = _rare(train, len(runs["exact"].head().weight))
    what = f"{weights}; {config.steps} steps of {config.tokens:,} tokens, {data}; AdamW, lr {LR:g}"
    console.print(f"compressed_sft: {what}; {threads} threads", highlight=False)

    steps, every = [], max(1, config.steps // 30)
    for step, batch in enumerate(train):
        row = {"step": step + 1}
        measure = step % every == 0 or step + 1 == len(train)
        for name, run in runs.items():
            row[f"loss_{name}"], update = run.step(step, batch, keep=measure)
            row[f"kept_{name}"] = run.kept
            if measure and name == "exact":
                truth = update
            elif measure:
                row |= {f"{part}_cosine_{name}": _cosine(truth[part], update[part]) for part in ("head", "body")}
        steps.append(row)
        if measure:
            console.print(
                "  ".join(f"{k} {v:.4f}" if k != "step" else f"step {v}" for k, v in row.items()), highlight=False
            )
    rows = [
        {"impl": name, "final_loss": steps[-1][f"loss_{name}"], **run.evaluate(held, rare)}
        for name, run in runs.items()
    ]
    checks = _checks(steps, rows)
    columns = {
        "impl": "",
        "final_loss": "training loss",
        "held_out_loss": "held-out loss",
        "rare_loss": "of rare targets",
    }
    harness.print_table("Head gradients in fine-tuning", columns, rows, dict.fromkeys(list(columns)[1:], ".4f"))
    for check in checks:
        console.print(check, style="green" if check.startswith("holds") else "bold red", highlight=False)
    record = harness.write_record(
        "compressed_sft", config.json, machine=machine, rows=rows, ratios={}, setting=what, steps=steps, checks=checks,
        rare_share_of_held_out=_share(held, rare),
    )  # fmt: skip
    _picture(record.parent / "compressed_sft.png", steps, names[1:], what)
    console.print(f"record in {record}, picture beside it", highlight=False)
    if failed := [check for check in checks if check.startswith("FAILS")]:
        raise Refusal(f"bench compressed_sft: {len(failed)} of {len(checks)} checks failed")


class Run:
    """One model with fp32 masters under bf16 weights, trained by AdamW with one kind of head gradients."""

    def __init__(self, name: str, path: Path, config: BenchConfig, out: Path):
        self.name = name
        self.kept = 1.0  # share of the columns whose gradients were exact in the last step; 1: it fell back
        settings = SFTConfig(model=str(path), data=[], out=out, max_tokens=config.tokens, dtype="bf16", device="cpu")
        self.model: Model = load_model(settings)
        self.parameters = [p for p in self.model.hf.parameters() if p.requires_grad]
        self.masters = [p.detach().float() for p in self.parameters]
        for p in self.parameters:
            p.data = p.data.bfloat16()
        weight = self.head().weight
        self.is_head = [p is weight for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)

    def head(self):
        return self.model.head()

    def loss(self, batch: PackedBatch) -> torch.Tensor:
        hidden, head, y = self.model.hidden(batch), self.head(), batch.labels[batch.labels != IGNORE]
        if self.name == "eager":
            return F.cross_entropy((F.linear(hidden, head.weight, head.bias) * head.logit_scale).float(), y)
        more = {"linear_bias": head.bias, "logit_scale": head.logit_scale, "softcap": head.softcap}
        if self.name == "compressed":
            more |= {"grad": "compressed", "eps": 2.0**-12, "rank": 64}
        loss, found = K.linear_weighted_nll(hidden, head.weight, y, torch.full(y.shape, 1 / len(y)), **more)
        self.kept = float(found.stats.get("columns_kept", 1.0))
        return loss

    def step(self, step: int, batch: PackedBatch, *, keep: bool) -> tuple[float, dict[str, list] | None]:
        """One optimizer step: the loss before it, and with `keep` the updates of head and body."""
        loss = self.loss(batch)
        loss.backward()
        for master, p in zip(self.masters, self.parameters):
            master.grad, p.grad = None if p.grad is None else p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, CLIP)
        before = [m.clone() for m in self.masters] if keep else []
        self.optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / WARMUP)
        self.optimizer.step()
        with torch.no_grad():
            for master, p in zip(self.masters, self.parameters):
                p.copy_(master)
        parts: dict[str, list] = {"head": [], "body": []}
        for old, new, is_head in zip(before, self.masters, self.is_head):
            parts["head" if is_head else "body"].append(new - old)
        return loss.item(), parts if keep else None

    @torch.no_grad()
    def evaluate(self, held: list[PackedBatch], rare: torch.Tensor) -> dict[str, float]:
        nll, targets = [], []
        for batch in held:
            hidden, head, y = self.model.hidden(batch), self.head(), batch.labels[batch.labels != IGNORE]
            found = K.linear_log_prob(
                hidden, head.weight, y, linear_bias=head.bias, logit_scale=head.logit_scale, softcap=head.softcap
            )
            nll.append(-found.log_prob)
            targets.append(y)
        nll, hit = torch.cat(nll), rare[torch.cat(targets)]
        return {"held_out_loss": nll.mean().item(), "rare_loss": nll[hit].mean().item() if hit.any() else float("nan")}


def _cosine(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    dot, aa, bb = (sum(float((x * y).sum()) for x, y in zip(p, q)) for p, q in ((a, b), (a, a), (b, b)))
    return dot / max((aa * bb) ** 0.5, 1e-30)


def _rows(config: BenchConfig, model: Path) -> tuple[list[PackedBatch], list[PackedBatch], str]:
    """Rows to train on, rows held out (other documents), and in words what they are."""
    from dataclasses import replace

    from longtrace.trainer.model import load_tokenizer
    from longtrace.trainer.traces import load_traces

    held = 2 if config.quick else HELD_OUT
    if config.data and not config.quick:
        traces = load_traces(
            config.data, load_tokenizer(str(model)), max_tokens=config.tokens, on_too_long="split", skip_bad_rows=True
        )
        aside = np.isin(traces.source, np.unique(traces.source)[::10])  # whole rows of the data, not pieces of them
        if aside.all():
            raise Refusal("--data: found one row; accepted: two or more, one of them is held out")
        sources = [TraceSource(traces, np.flatnonzero(part), config.tokens, 1, 0) for part in (~aside, aside)]
        held = min(held, len(sources[1].rows))
        packed = [[source.next()[0] for _ in range(n)] for source, n in zip(sources, (config.steps, held))]
        return *packed, f"traces of {', '.join(Path(spec).name for spec in config.data)}, longer ones split"
    flat, text = sft_throughput._rows(replace(config, data=None, steps=config.steps + held), model)
    batches = []
    for i in range(config.steps + held):
        ids, labels, lengths = (torch.from_numpy(flat[f"{k}{i}"]).long() for k in ("ids", "labels", "lengths"))
        ends = F.pad(lengths.cumsum(0), (1, 0)).int()
        positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
        batches.append(PackedBatch(ids, positions, ends, int(lengths.max()), labels, list(range(len(lengths)))))
    return batches[: config.steps], batches[config.steps :], text


def _rare(train: list[PackedBatch], vocabulary: int) -> torch.Tensor:
    """(V,) bool: the least frequent training targets that together are at most RARE of them, and those never seen."""
    counts = torch.bincount(torch.cat([b.labels[b.labels != IGNORE] for b in train]), minlength=vocabulary)
    order = counts.argsort()
    rare = torch.zeros(vocabulary, dtype=torch.bool)
    rare[order[counts[order].cumsum(0) <= RARE * counts.sum()]] = True
    return rare


def _share(held: list[PackedBatch], rare: torch.Tensor) -> float:
    return rare[torch.cat([b.labels[b.labels != IGNORE] for b in held])].float().mean().item()


def _checks(steps: list[dict], rows: list[dict]) -> list[str]:
    lines, exact = [], next(row for row in rows if row["impl"] == "exact")
    for row in rows:
        name = row["impl"]
        if name == "exact":
            continue
        apart = max(abs(s[f"loss_{name}"] / s["loss_exact"] - 1) for s in steps)
        head, body = (
            float(np.median([s[k] for s in steps if k in s])) for k in (f"head_cosine_{name}", f"body_cosine_{name}")
        )
        for ok, text in (
            (apart <= 0.01, f"training loss within 1 % at every step (largest {100 * apart:.2f} %)"),
            *((row[k] <= 1.005 * exact[k] or np.isnan(exact[k]), f"{k} at most 0.5 % above exact's ({row[k]:.4f}, {exact[k]:.4f})")
              for k in ("held_out_loss", "rare_loss")),
            (head >= 0.9, f"median cosine of head updates {head:.3f}, at least 0.9"),
            (body >= 0.9, f"median cosine of body updates {body:.3f}, at least 0.9"),
        ):  # fmt: skip
            lines.append(f"{'holds' if ok else 'FAILS'}: {name}: {text}")
    return lines


def _picture(path: Path, steps: list[dict], names: list[str], note: str) -> None:
    from ..head_report import _figure

    figure, axes = _figure("Compressed and exact head gradients, in lockstep", note, 3)
    x, colours = [s["step"] for s in steps], {"exact": "#15181e", "compressed": "#2f6fde", "eager": "#9aa4b2"}
    axes[0].plot(x, [s["loss_exact"] for s in steps], color="#15181e", linewidth=2.4, label="exact")
    for name in names:
        axes[0].plot(x, [s[f"loss_{name}"] for s in steps], color=colours[name], linewidth=1, label=name)
        apart = [100 * (s[f"loss_{name}"] / s["loss_exact"] - 1) for s in steps]
        axes[1].plot(x, apart, color=colours[name], label=name)
        for part, style in (("head", "-"), ("body", "--")):
            points = [(s["step"], s[f"{part}_cosine_{name}"]) for s in steps if f"{part}_cosine_{name}" in s]
            axes[2].plot(*zip(*points), style, color=colours[name], label=f"{part}, {name}")
    labels = ("training loss, nats", "training loss against exact, %", "cosine of AdamW updates with exact's")
    for ax, text in zip(axes, labels):
        ax.set_xlabel("step")
        ax.set_ylabel(text)
        ax.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4)
    figure.savefig(path)
