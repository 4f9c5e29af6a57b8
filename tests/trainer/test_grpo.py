"""`longtrace grpo` from the command's dataclass to the run folder, and the source's accounting."""

import json
import math

import numpy as np
import pytest
import torch

from longtrace.trainer import checkpoint, cli, grpo, rollout, verifier
from longtrace.trainer.config import NonFinite, Refusal, to_yaml
from longtrace.trainer.evaluate import cons_at_k, pass_at_k
from longtrace.trainer.experience import (
    LOG_PROBS,
    Experience,
    Group,
    Prompt,
    RolloutSource,
    Step,
    as_tensors,
    from_tensors,
)
from longtrace.trainer.grpo import GRPOConfig
from longtrace.trainer.model import Masters, load_model
from longtrace.trainer.objectives import CLIPS, PolicyGradient, token_weights
from longtrace.trainer.rollout import Completion, Engine
from longtrace.trainer.rows import Row
from longtrace.trainer.train import _line

CHAINS = "generated:chain,steps=2,modulus=10,rows=40"


def config_of(folder, out, **changes):
    defaults = dict(
        model=str(folder), data=[CHAINS], out=out, max_tokens=160, tokens_per_row=480, max_new_tokens=16, steps=3,
        prompts_per_rollout=4, group_size=4, lr=1e-3, dtype="fp32", activation_checkpointing="off", slots=16, warmup=0,
        schedule="constant", reward=["tests_grpo_rewards:digits"],
    )  # fmt: skip
    return GRPOConfig(**(defaults | changes))


@pytest.fixture(autouse=True)
def digits(tmp_path, monkeypatch):
    """A user's reward: the share of digits in what was written. It differs within most groups."""
    (tmp_path / "tests_grpo_rewards.py").write_text(
        "def digits(completions, rows):\n    return [sum(c.isdigit() for c in t) / max(len(t), 1) for t in completions]\n"
    )
    monkeypatch.chdir(tmp_path)


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_a_run_leaves_a_model_metrics_samples_and_a_page(tiny_model, tmp_path, capsys):
    out = tmp_path / "run"
    result = grpo.grpo(config_of(tiny_model(), out, eval_data=[CHAINS + ",split=test"], eval_limit=3, eval_samples=2))
    assert result.steps == 3 and len(result.metrics) == 3
    row = result.metrics[-1]
    for name in ("reward", "reward_tests_grpo_rewards:digits", "groups_mixed", "completion_tokens", "cut_off",
                 "generate_tok_per_sec", "reflections", "entropy"):  # fmt: skip
        assert math.isfinite(row[name]), name
    assert row["groups_mixed"] + row["groups_all_right"] + row["groups_all_wrong"] == 4
    assert {"eval_pass@1", "eval_pass@2", "eval_cons@2", "eval_tokens", "eval_cut_off"} <= row.keys()
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == {1, 2, 3} and samples[0]["problem"].startswith("Start with")
    page = (out / "report.html").read_text()
    assert "Reinforcement learning of" in page and "What it writes" in page and "<svg" in page
    before, after = weights(tiny_model()), weights(out)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_line_of_a_step_tells_rewards_and_length():
    row = dict(loss=0.0, lr=1e-4, grad_norm=1.0, tok_per_sec=9.0, mfu=None, epoch=0.5, completion_tokens=41.6)
    row |= {"reward": 1.25, "reward_std": 0.5, "reward_accuracy": 0.75}
    assert _line(row, 9).endswith("| reward 1.250 | 42 tokens | epoch 0.50"), "one reward is its sum"
    row["reward_format"] = 0.5
    assert _line(row, 9).endswith("| reward 1.250 | accuracy 0.75 | format 0.50 | 42 tokens | epoch 0.50")


def test_more_of_what_is_rewarded(tiny_model, tmp_path):
    """Thirty steps on the share of digits: the policy writes clearly more of them."""
    result = grpo.grpo(
        config_of(tiny_model(), tmp_path / "run", steps=30, lr=1e-2, prompts_per_rollout=8, group_size=8)
    )
    rewards = [row["reward"] for row in result.metrics]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.15


@pytest.mark.parametrize(
    "options", [{}, {"steps_per_rollout": 2, "beta": 0.05, "reference_reset": 2}], ids=["one", "two"]
)
def test_resuming_is_exact(options, tiny_model, tmp_path):
    """Stopped after step 3 of 5, in the middle of a rollout with two steps each: the same bits at the end."""
    whole = grpo.grpo(config_of(tiny_model(), tmp_path / "whole", steps=5, save_every=3, keep_last=2, **options))
    part = tmp_path / "part"
    grpo.grpo(config_of(tiny_model(), part, steps=5, save_every=3, keep_last=2, **options))
    for later in sorted((part / "checkpoints").glob("step-0000000[45]")):
        checkpoint._remove(later)
    again = grpo.grpo(config_of(tiny_model(), part, steps=5, save_every=3, resume="auto", **options))
    assert [row["loss"] for row in again.metrics] == [row["loss"] for row in whole.metrics]
    a, b = weights(tmp_path / "whole"), weights(part)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (part / "samples.jsonl").read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()


def like(a, b):
    """Whether two lists of steps are equal, bit for bit."""
    plain = [
        [(s.counted, [(e.prompt, e.completion, e.advantage, e.number) for e in s.experiences]) for s in x]
        for x in (a, b)
    ]
    arrays = [[getattr(e, name) for s in x for e in s.experiences for name in LOG_PROBS] for x in (a, b)]
    return plain[0] == plain[1] and all(
        (one is None) == (two is None) and (one is None or (one.dtype, one.tobytes()) == (two.dtype, two.tobytes()))
        for one, two in zip(*arrays, strict=True)
    )


def steps_of(seed, steps, completions, tokens, log_probs=LOG_PROBS):
    draw = np.random.default_rng(seed)

    def experience(n):
        length = int(draw.integers(tokens // 2, tokens + 1))
        arrays = {name: draw.normal(-1, 1, length).astype(np.float32) for name in log_probs}
        ids = draw.integers(0, 151_936, length + 200).tolist()
        return Experience(ids[:200], ids[200:], float(draw.normal()), n, **{"rollout_log_prob": None} | arrays)

    made = [[experience(n) for n in range(completions)] for _ in range(steps)]
    return [Step(own, [len(e.completion) for e in own] + [7]) for own in made]


def test_a_buffer_survives_its_tensors(seed):
    """With and without reference and old log-probs, steps that hold nothing, no steps at all."""
    for log_probs in (LOG_PROBS, LOG_PROBS[:1]):
        steps = [*steps_of(seed, 2, 3, 9, log_probs), Step([], [4, 1]), Step([], [])]
        assert like(from_tensors(as_tensors(steps)), steps)
    assert like(from_tensors(as_tensors([Step([], [3])])), [Step([], [3])])
    assert as_tensors([]) == {} and from_tensors({}) == []


def test_a_buffer_of_r1s_size_is_a_few_bytes_a_token(tiny_model, tmp_path, seed):
    """16 prompts x 16 completions of up to 15,000 tokens with three log-probs each: 16 bytes a token, none of it text."""
    source, _ = source_of(tiny_model, tmp_path, [[0, 1]])
    steps = source.buffer = steps_of(seed, 4, 64, 15_000)
    prompts, completions = (
        sum(len(getattr(e, x)) for s in steps for e in s.experiences) for x in ("prompt", "completion")
    )
    state = source.state_dict()
    assert len(json.dumps(state)) < 2000
    source.tokens_per_row = 16_000
    assert source.next() and len(source.buffer) == 3  # the loop goes on; what is saved is the boundary
    tensors = {f"source.{name}": tensor for name, tensor in source.tensors().items()}
    saved = checkpoint.save(tmp_path / "checkpoints", 1, tensors, {"source": state}, keep_last=1)
    size = sum(file.stat().st_size for file in saved.iterdir())
    assert size < 4 * prompts + 16 * completions + 50_000
    tensors, state = checkpoint.load(saved)
    source.load_state_dict(state["source"], {name.removeprefix("source."): x for name, x in tensors.items()})
    assert like(source.buffer, steps) and source.steps == 0


@pytest.mark.parametrize("damage", ["missing", "torn"])
def test_a_damaged_buffer_is_refused(damage, tiny_model, tmp_path):
    out = tmp_path / "run"
    grpo.grpo(config_of(tiny_model(), out, steps=1, steps_per_rollout=2))
    file = out / "checkpoints" / "step-00000001" / "other.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Refusal, match=f"other.safetensors: {damage}"):
        grpo.grpo(config_of(tiny_model(), out, steps=2, steps_per_rollout=2, resume="auto"))


def test_a_state_without_its_buffer_is_refused(tiny_model, tmp_path, seed):
    source, _ = source_of(tiny_model, tmp_path, [[0, 1]])
    source.buffer = steps_of(seed, 3, 2, 5)
    with pytest.raises(Refusal, match="rollout buffer holds 0 steps, its state says 3"):
        source.load_state_dict(source.state_dict(), {})


def test_verdicts_are_not_asked_for_twice(tiny_model, tmp_path):
    """A scorer in the pool that says something else once the run was interrupted: resumed, it is not asked again."""
    (tmp_path / "tests_moody.py").write_text(
        "import os\n"
        "def scorer(answer, gold):\n"
        "    with open('asked', 'a') as file: file.write(answer + '\\n')\n"
        "    return (0.1 if os.path.exists('interrupted') else 0.2) * int(answer)\n"
    )
    (tmp_path / "tests_pooled_reward.py").write_text(
        "from longtrace.trainer import verifier\n"
        "def lengths(completions, rows):\n"
        "    return verifier.default().check([('tests_moody:scorer', str(len(t) % 3), '') for t in completions])\n"
    )
    options = dict(reward=["tests_pooled_reward:lengths"], steps=5, save_every=3, keep_last=2)

    def new_process():
        verifier.default().close()
        verifier.default.cache_clear()

    new_process()
    try:
        whole = grpo.grpo(config_of(tiny_model(), tmp_path / "whole", **options))
        new_process()
        grpo.grpo(config_of(tiny_model(), tmp_path / "part", **options | {"steps": 3}))
        new_process()
        (tmp_path / "interrupted").touch()
        again = grpo.grpo(config_of(tiny_model(), tmp_path / "part", **options, resume="auto"))
        asked = (tmp_path / "asked").read_text().split()
        assert sorted(asked) == ["0", "0", "1", "1", "2", "2"], "once in each of two runs"
        for name in ("loss", "reward", "verifier_asked", "verifier_cached"):
            assert [row[name] for row in again.metrics] == [row[name] for row in whole.metrics], name
        assert whole.metrics[0]["verifier_asked"] == 16 and whole.metrics[-1]["verifier_cached"] == 16
        a, b = weights(tmp_path / "whole"), weights(tmp_path / "part")
        assert all(torch.equal(a[name], b[name]) for name in a)
    finally:
        new_process()


def test_a_run_repeats_itself_bit_for_bit(tiny_model, tmp_path):
    runs = [grpo.grpo(config_of(tiny_model(), tmp_path / name, steps=3)) for name in ("first", "again")]
    told = [[{k: v for k, v in row.items() if not _timed(k)} for row in run.metrics] for run in runs]
    assert told[0] == told[1] and len(told[0]) == 3
    first, again = (weights(tmp_path / name) for name in ("first", "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def _timed(name):
    return name in ("dt", "seconds", "mfu") or name.endswith(("_seconds", "tok_per_sec"))


def test_clips_are_the_losss_own_and_a_run_folder_says_which(tiny_model, tmp_path):
    for loss, clips in CLIPS.items():
        found = grpo.check(config_of(tiny_model(), tmp_path / "out", loss=loss))
        assert (found.clip_low, found.clip_high) == clips
        file = tmp_path / "config.yaml"
        file.write_text(to_yaml(found))
        again = grpo.check(cli.parse("grpo", GRPOConfig, ["--config", str(file)]))
        assert again == found
    for loss, clips in CLIPS.items():  # another loss by a flag: not the file's clips
        changed = grpo.check(cli.parse("grpo", GRPOConfig, ["--config", str(file), "--loss", loss]))
        assert (changed.clip_low, changed.clip_high) == clips
        assert changed.scale_rewards == ("none" if loss == "dr_grpo" else "group_std")
    kept = cli.parse("grpo", GRPOConfig, ["--config", str(file), "--loss", "cispo", "--clip-high", "3"])
    assert grpo.check(kept).clip_high == 3
    found = grpo.check(config_of(tiny_model(), tmp_path / "out", loss="gspo", clip_low=0.0, clip_high=1.0))
    assert (found.clip_low, found.clip_high) == (0.0, 1.0)


def test_a_model_that_diverged_ends_a_rollout_with_one_line(tiny_model, tmp_path, capsys, monkeypatch):
    """NaN and infinite logits: exit 1, and the checkpoints are as they were."""
    out = tmp_path / "run"
    grpo.grpo(config_of(tiny_model(), out, steps=1))
    held = {file: file.read_bytes() for file in (out / "checkpoints").rglob("*") if file.is_file()}
    generate = rollout.Engine.generate

    def broken_by(value):
        def run(self, *args, **kwargs):
            with torch.no_grad():
                self.model.get_output_embeddings().weight[7] = value
            return generate(self, *args, **kwargs)

        return run

    for value in (math.nan, math.inf):
        monkeypatch.setattr(rollout.Engine, "generate", broken_by(value))
        with pytest.raises(NonFinite, match="logits are not finite in 16 of 16"):
            grpo.grpo(config_of(tiny_model(), out, steps=2, resume="auto"))
    assert {file: file.read_bytes() for file in (out / "checkpoints").rglob("*") if file.is_file()} == held
    arguments = ["--model", str(tiny_model()), "--data", CHAINS, "--out", str(tmp_path / "other"), "--max-tokens", "160",
                 "--max-new-tokens", "16", "--dtype", "fp32", "--steps", "1"]  # fmt: skip
    assert cli.main(["grpo", *arguments]) == 1
    assert "longtrace grpo: the model's logits are not finite" in capsys.readouterr().err


def source_of(tiny_model, tmp_path, rewards, **changes):
    """A source whose rollouts are made up: group i has rewards[i]."""
    config = grpo.check(config_of(tiny_model(), tmp_path / "out", **changes))
    model = load_model(config)
    draw = np.random.default_rng(0)
    prompts = [Prompt([5, 6, 7 + i], Row([{"content": "?"}], None, "", {}), None) for i in range(len(rewards))]
    source = RolloutSource(config, model, None, prompts, None)
    groups = []
    for i, own in enumerate(rewards):
        done = [Completion(draw.integers(5, 60, n).tolist(), [-1.0] * n, True) for n in draw.integers(1, 9, len(own))]
        groups.append(Group(i, done, np.array(own, dtype=float), {}))
    source._generate = lambda numbers, attempt, say: groups
    return source, model


def gradient(source, model, objective):
    batches = source.next()
    count = sum(objective.count(b) for b in batches)
    model.hf.zero_grad()
    for batch in batches:
        (objective(model.hidden(batch), model.head(), batch)[0] / count).backward()
    return torch.cat([p.grad.flatten() for p in model.hf.parameters() if p.grad is not None]), batches, count


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_degenerate_groups_leave_and_change_nothing(loss, tiny_model, tmp_path):
    """Equal gradients with and without them in the forward; the denominators keep their rows."""
    rewards = [[1, 1, 1], [0.7] * 8, [0, 1, 0, 1], [0, 0], [1], [0.2, 0.9, 0.4]]
    left, model = source_of(tiny_model, tmp_path, rewards, loss=loss)
    got, batches, count = gradient(left, model, PolicyGradient(loss))
    assert sum(len(b.documents) for b in batches) == 7
    kept, model = source_of(tiny_model, tmp_path, rewards, loss=loss, entropy_bonus=1e-300)
    expected, batches, whole = gradient(kept, model, PolicyGradient(loss, entropy_bonus=1e-300))
    assert sum(len(b.documents) for b in batches) == sum(map(len, rewards))
    assert count == pytest.approx(whole)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_each_reward_may_be_normalised_by_itself(tiny_model, tmp_path):
    """GDPO, written out: within its group, weighted, summed, over the batch's deviation; what no reward tells apart leaves."""
    from longtrace.trainer.rewards import Rewards

    config = grpo.check(
        config_of(tiny_model(), tmp_path / "out", scale_rewards="each", reward=["format", "overlong:16:8=0.5"])
    )
    model = load_model(config)
    prompts = grpo.read_prompts(config.data, model, config)
    one = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, math.nan]])  # the last one was cut off
    two = np.array([[0, 2, 1, 3], [5, 5, 5, 5], [0, 0, 2, 2], [2, 0, 2, 0]], dtype=float)

    def score(asked, done):
        return np.nansum([one, 0.5 * two], 0).flatten(), {"format": one.flatten(), "overlong:16:8": two.flatten()}

    class Engine:
        def generate(self, *args, **kwargs):
            return [[Completion([5, 6], [-1.0, -1.0], (g, n) != (3, 3)) for n in range(4)] for g in range(4)]

    source = RolloutSource(config, model, Engine(), prompts, score, Rewards(config.reward))
    found = [e for step in source._roll_out(lambda text: None) for e in step.experiences]

    def normalised(x):
        x = np.nan_to_num(x)  # cut off: not right
        return (x - x.mean(1, keepdims=True)) / (x.std(1, keepdims=True, ddof=1) + 1e-4)

    total = normalised(one) + 0.5 * normalised(two)
    expected = (total / (total.std(ddof=1) + 1e-4)).flatten()
    assert np.ptp((one + 0.5 * two)[2]) == 0
    assert source.metrics["groups_mixed"] == 3, "a group of equal sums whose parts differ is mixed"
    np.testing.assert_allclose([e.advantage for e in found], expected[expected != 0], rtol=1e-6)


def test_the_reference_follows_every_so_many_steps(tiny_model, tmp_path):
    """Three steps a rollout, a reset after two: at the first rollout that begins two steps or more after the last."""
    config = grpo.check(config_of(tiny_model(), tmp_path / "out", beta=0.1, reference_reset=2, steps_per_rollout=3))
    model = load_model(config)
    prompts = grpo.read_prompts(config.data, model, config)
    source = RolloutSource(config, model, Engine.of(model, 16), prompts, lambda asked, done: (np.arange(16.0), {}))
    seen = []
    for _ in range(7):
        source.next()
        kept, now = (next(iter(m.parameters())).detach() for m in (source.reference, model.base))
        seen.append(torch.equal(kept, now))
        with torch.no_grad():
            next(iter(model.base.parameters())).add_(0.01)
    assert seen == [True, False, False, True, False, False, True]


def test_resampling_fills_the_batch_and_tells_of_everything(tiny_model, tmp_path):
    """Groups with equal rewards give way to other prompts', but the numbers are those of all that was written."""
    config = grpo.check(config_of(tiny_model(), tmp_path / "out", resample=3, steps_per_rollout=2))
    model = load_model(config)
    prompts = grpo.read_prompts(config.data, model, config)
    calls = []

    def score(asked, done):  # the first round: one group of four is mixed
        calls.append(len(done))
        rewards = np.ones(len(done))
        rewards[0 if len(calls) == 1 else slice(None, None, 2)] = 0
        return rewards, {"accuracy": rewards}

    source = RolloutSource(config, model, Engine.of(model, 16), prompts, score)
    batches = source.next() + source.next()
    assert calls == [16, 12] and sum(len(b.documents) for b in batches) == 16
    assert source.rollouts == 1 and source.next() and source.metrics["groups_mixed"] == 4
    told = RolloutSource(config, model, Engine.of(model, 16), prompts, score)
    calls.clear()
    told.next()
    assert told.metrics["groups_all_right"] == 3 and told.metrics["groups_mixed"] == 4
    assert told.metrics["reward"] == pytest.approx((15 + 6) / 28)


def test_a_signal_stops_a_rollout(tiny_model, tmp_path, monkeypatch):
    """SIGTERM while completions are written: exit 143, a checkpoint of the last whole step, and an exact resume."""
    import os
    import signal

    whole = grpo.grpo(config_of(tiny_model(), tmp_path / "whole"))
    out, step = tmp_path / "part", RolloutSource.next

    def killed(self, say):
        if self.steps == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, say)

    monkeypatch.setattr(RolloutSource, "next", killed)
    with pytest.raises(SystemExit) as ended:
        grpo.grpo(config_of(tiny_model(), out))
    assert ended.value.code == 143 and checkpoint.latest(out / "checkpoints").name == "step-00000002"
    monkeypatch.setattr(RolloutSource, "next", step)
    again = grpo.grpo(config_of(tiny_model(), out, resume="auto"))
    assert [row["loss"] for row in again.metrics] == [row["loss"] for row in whole.metrics]
    a, b = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_lora_takes_the_model_without_adapters_as_reference(tiny_model, tmp_path):
    pytest.importorskip("peft")
    result = grpo.grpo(config_of(tiny_model(), tmp_path / "run", lora_rank=2, beta=0.1, steps=2, lr=0.05))
    first, second = (row["kl"] for row in result.metrics)
    assert abs(first) < 1e-6 < second


def test_a_step_without_a_gradient_is_a_step(tiny_model, tmp_path):
    source, _ = source_of(tiny_model, tmp_path, [[1, 1], [0, 0]])
    assert source.next() == [] and source.steps == 1
    assert source.metrics["groups_all_right"] == 1 and source.metrics["groups_all_wrong"] == 1


def test_masked_completions_leave_the_denominators(tiny_model, tmp_path):
    source, _ = source_of(tiny_model, tmp_path, [[0, 1, math.nan], [1, 0]])
    batches = source.next()
    assert sum(b.count for b in batches) == 4 and sum(len(b.documents) for b in batches) == 4


def test_the_first_update_has_ratio_one_and_no_divergence(tiny_model, tmp_path):
    config = grpo.check(config_of(tiny_model(), tmp_path / "out", beta=0.1, dtype="bf16", steps_per_rollout=2))
    model = load_model(config)
    source = RolloutSource(
        config, model, Engine.of(model, 16), grpo.read_prompts(config.data, model, config),
        lambda asked, done: (np.array([float(len(c.tokens) % 5) + c.tokens[0] % 3 for c in done]), {}),
    )  # fmt: skip
    Masters(model, torch.bfloat16)  # as the loop does, after the source has taken its reference
    objective = PolicyGradient(beta=0.1)
    targets = ratios = kl = 0.0
    for batch in source.next():
        model.hf.eval()
        _, metrics = objective(model.hidden(batch), model.head(), batch)
        targets += int((batch.labels != -100).sum())
        ratios, kl = ratios + metrics["ratio"][0], kl + metrics["kl"][0]
    assert targets and abs(ratios / targets - 1) < 1e-5 and abs(kl / targets) < 1e-5


def test_token_weights_are_the_papers_normalisers():
    for loss, expected in (
        ("grpo", [1 / 4 / 2, 1 / 2 / 2]),
        ("dapo", [1 / 6, 1 / 6]),
        ("dr_grpo", [1 / 10 / 2, 1 / 10 / 2]),
    ):
        weights, count = token_weights(loss, [4, 2], 10)
        np.testing.assert_allclose(np.array(weights) / count, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "--temperature 0"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"group_size": 0}, "--group-size 0"),
        ({"group_size": 1}, "--group-size 1"),
        ({"clip_ratio": 1.1}, "--clip-ratio 1.1"),
        ({"entropy_bonus": math.nan}, "--entropy-bonus nan"),
        ({"stop": [""]}, "--stop"),
        ({"steps_per_rollout": 5}, "--steps-per-rollout 5"),
        ({"max_new_tokens": 160}, "--max-new-tokens 160"),
        ({"reference_reset": 4}, "--reference-reset needs --beta"),
        ({"loss": "cispo", "clip_low": 0.2}, "--loss cispo bounds ratios by --clip-high alone"),
        ({"loss": "cispo", "clip_ratio": 7.0}, "--loss cispo bounds ratios by --clip-high alone"),
        ({"clip_high": -0.1}, "--clip-high -0.1"),
        ({"tokens_per_row": 100}, "--tokens-per-row 100"),
        ({"reward": ["accuracies"]}, "--reward accuracies"),
        ({"max_tokens": 40}, "a prompt of"),
        ({"patience": 2}, "--patience needs"),
    ],
)
def test_what_cannot_be_used_is_refused(changes, message, tiny_model, tmp_path):
    with pytest.raises(Refusal, match=message):
        grpo.grpo(config_of(tiny_model(), tmp_path / "out", **changes))


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    from itertools import combinations

    for n, c, k in ((5, 2, 3), (6, 0, 2), (6, 6, 1), (4, 1, 4)):
        samples = [1] * c + [0] * (n - c)
        share = np.mean([any(chosen) for chosen in combinations(samples, k)])
        assert pass_at_k(n, c, k) == pytest.approx(share)
    with pytest.raises(ValueError, match="needs 1 <= k"):
        pass_at_k(3, 1, 4)


def test_cons_at_k_is_the_majoritys_share():
    assert cons_at_k(["3", "3", "4", None], "3", 4) == 1
    assert cons_at_k(["3", "4"], "3", 2) == 0.5
    assert cons_at_k([None, None], "3", 2) == 0
    assert cons_at_k(["3", "3", "4", "4", "4"], "3", 1) == pytest.approx(0.4, abs=0.06)
    with pytest.raises(ValueError, match="accepted: 1 to 2"):
        cons_at_k(["1", "2"], "1", 3)
