"""The head bench: inputs that look like real ones, errors that are seen, memory that is counted, a record as promised."""

from __future__ import annotations

import json

import pytest
import torch

from longtrace import bench
from longtrace.bench import harness, head, head_inputs, head_peers, head_report
from longtrace.trainer.config import Refusal

CONTRACT = {"impl", "op", "T", "H", "V", "dtype", "ms", "workspace_mb", "gradient_mb", "logprob_err", "dh_err", "dw_err",
            "dw_row_err", "columns_kept", "coefficients", "inputs"}  # fmt: skip
MB = 1e6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Generated inputs of 512 tokens, and the float64 reference of all kinds of coefficients."""
    folder = tmp_path_factory.mktemp("head")
    data = head_inputs.generate(512, 2048, 64)
    torch.save(data, folder / "inputs.pt")
    job = {
        "path": str(folder / "inputs.pt"),
        "T": 512,
        "kinds": list(head_inputs.KINDS),
        "reference": str(folder / "r.pt"),
    }
    assert 0 < head.write_reference(job)["dropped"] < 1
    return data, torch.load(folder / "r.pt", weights_only=True), job


def test_unusable_options_are_refused():
    for more, message in (
        ({"impls": ["warp"]}, "--impls: found warp; accepted: gemms, eager"),
        ({"inputs": ["real:4096"]}, "found no --model or no --data"),
        ({"inputs": ["generated:4096"]}, "accepted: real:T, generated:T,V,H"),
        ({"inputs": ["generated:4096,0,3"]}, "accepted: real:T, generated:T,V,H"),
        ({"repeats": 0}, "--repeats 1 or more"),
    ):
        with pytest.raises(Refusal, match=message):
            bench.bench(bench.BenchConfig(name="head", **more))


def test_generated_inputs_reproduce_the_measured_distribution():
    """Within 0.15 for p_max, 0.5 nats for entropy and nll, 1 nat for log p at a rank, a third for what compression sees."""
    found = head_inputs.profile(**head_inputs.generate(1024, 16384, 256), ranks=(1, 16, 64))
    true = head_inputs.MEASURED
    for name, within in (("p_max", 0.15), ("entropy", 0.5)):
        assert all(abs(a - b) < within for a, b in zip(found[name], true[name])), (name, found[name])
    assert all(abs(a - b) < 0.6 for a, b in zip(found["nll"][:5], true["nll"])), found["nll"]
    assert abs(found["nll_mean"] - true["nll_mean"]) < 0.5
    for rank in (1, 4, 16, 64, 256, 1024):
        assert abs(found["log_p_at_rank"][rank] - true["log_p_at_rank"][rank]) < 1.0, (rank, found["log_p_at_rank"])
    assert 2 / 3 < found["columns_kept"][12] / true["columns_kept"][12] < 1.6, found["columns_kept"]
    assert found["dropped_mass"] < 2 * true["dropped_mass"]
    # the tail is nearly low rank: 64 clusters leave about 8 %, one leaves a quarter
    assert 0.04 < found["tail_error"][64] < 0.12 and found["tail_error"][16] < 0.2 < found["tail_error"][1]


def test_random_inputs_do_not_look_real():
    draw = torch.Generator().manual_seed(0)
    h, w = torch.randn(256, 64, generator=draw), torch.randn(4096, 64, generator=draw) / 8
    found = head_inputs.profile(h, w, torch.zeros(256, dtype=torch.long), ranks=())
    assert found["p_max"][3] < 0.1 and found["entropy"][3] > 6 and found["columns_kept"][12] > 0.99


def test_coefficients():
    for kind in head_inputs.KINDS:
        c = head_inputs.coefficients(kind, 800)
        assert abs(c.abs().sum().item() - 1) < 1e-5
    assert (head_inputs.coefficients("sparse", 800) != 0).sum() == 8
    assert (head_inputs.coefficients("sequence", 800).view(8, 100).sign().float().std(1) == 0).all()
    assert 0.4 < (head_inputs.coefficients("random", 800) > 0).float().mean() < 0.6


def test_the_reference_is_autograds(inputs):
    data, reference, _ = inputs
    for kind in head_inputs.KINDS:
        h, w = (data[k].double().requires_grad_() for k in "hw")
        log_prob = torch.log_softmax(h @ w.T, 1).gather(1, data["y"][:, None])[:, 0]
        (-(head_inputs.coefficients(kind, 512) * log_prob).sum()).backward()
        assert torch.allclose(reference["log_prob"], log_prob, atol=1e-10)
        torch.testing.assert_close(reference[f"dh/{kind}"].double(), h.grad, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(reference[f"dw/{kind}"].double(), w.grad, rtol=1e-6, atol=1e-9)
    p = torch.softmax(data["h"].double() @ data["w"].double().T, 1)
    assert (p[:, reference["dropped"]] < 2**-12).all()
    assert not reference["dropped"][data["y"]].any()


@pytest.mark.parametrize("key", [k for k in head_peers.IMPLS if k not in ("gemms", "cce")])
def test_every_implementation_computes_the_same_thing(inputs, key):
    if why := head_peers.missing(key):
        pytest.skip(why)
    data, reference, _ = inputs
    compressed = key.startswith("compressed")
    # without a bound on the error, signs that cancel leave little of the tail
    every_kind = head_peers.IMPLS[key].weighted and key not in head_peers.SWEEP
    for kind in head_inputs.KINDS if every_kind else ["ones"]:
        result = head_peers.run(key, **data, c=head_inputs.coefficients(kind, 512))
        errors = head.compare(result, reference, kind)
        assert errors["dh_err"] < 0.02 and errors["dw_err"] < 0.02, errors
        assert errors["dw_row_err"] < (0.5 if compressed else 0.1), errors
        if errors["logprob_err"] is not None:
            assert errors["logprob_err"] < (1e-4 if key in head_report.OURS else 0.2)


def test_a_wrong_implementation_is_seen(inputs, monkeypatch):
    data, reference, _ = inputs

    def forgetful(h, w, y, c):
        """Without the gradient of the small probabilities, as a filter leaves it, and one log-prob off by 1."""
        logits = torch.nn.functional.linear(h, w).float()
        p = logits.detach().softmax(1)
        log_prob = torch.log_softmax(logits, 1).gather(1, y[:, None])[:, 0]
        kept = torch.where(p.amax(0) > 2**-12, logits, logits.detach())
        kept[torch.arange(len(y)), y] = logits[torch.arange(len(y)), y]
        loss = -(c * torch.log_softmax(kept, 1).gather(1, y[:, None])[:, 0]).sum()
        return loss, log_prob + torch.eye(len(y))[7], {}

    monkeypatch.setitem(head_peers.IMPLS, "wrong", head_peers.Impl("wrong", "wrong", forgetful, 3))
    errors = head.compare(head_peers.run("wrong", **data, c=head_inputs.coefficients("ones", 512)), reference, "ones")
    assert errors["dw_row_err"] > 0.99, "rows whose gradient was dropped are all wrong"
    assert errors["dw_err"] < 0.05, "which the error of the whole does not show"
    assert abs(errors["logprob_err"] - 1) < 0.2


def test_memory_counts_what_an_op_holds_whoever_allocates_it(inputs):
    """In a process of its own, as the bench does it: eager holds whole logits, ours at most its budget."""
    _, _, job = inputs
    job = {"path": job["path"], "T": 512, "reference": None, "pairs": [("eager-fp32", "ones"), ("gemms", "ones")]}
    found = harness.in_process("longtrace.bench.head:measured", job, threads=1, environment=head.ALLOCATOR)
    eager = found["eager-fp32/ones"]
    assert abs(eager["gradient_mb"] - (512 + 2048) * 64 * 2 / MB) < 1e-6
    logits = 512 * 2048 / MB
    assert 8 * logits < eager["workspace_mb"] < 20 * logits, eager
    assert 1.5 * logits < found["gemms/ones"]["workspace_mb"] < 5 * logits and found["gemms/ones"]["gradient_mb"] == 0


def fake_rows():
    """Rows as measured, at made-up speeds: three lengths, and a sweep of eps and rank."""
    base = {"H": 64, "V": 512, "dtype": "bfloat16", "gradient_mb": 1.0, "logprob_err": 1e-6, "dh_err": 1e-3, "dw_err": 1e-3,
            "dw_row_err": 1e-3, "columns_kept": 1.0, "coefficients": "ones", "note": ""}  # fmt: skip
    rows = []
    for inputs, lengths, keys in (
        ("lengths", (1024, 2048, 4096), head_peers.CORE),
        ("generated:4096,512,64", (4096,), [*head_peers.CORE, *head_peers.SWEEP]),
    ):
        for T in lengths:
            for i, key in enumerate(keys):
                impl = head_peers.IMPLS[key]
                more = {
                    "eps": impl.options.get("eps"),
                    "rank": impl.options.get("rank"),
                    "impl": impl.impl,
                    "op": impl.op,
                }
                speed = {"ms": T * (1.0 + 0.1 * i), "workspace_mb": T / (1 + i)}
                rows.append(base | more | speed | {"T": T, "key": key, "inputs": inputs})
    return rows


def test_ratios_checks_and_pictures(tmp_path):
    rows = fake_rows()
    ratios = head_report.ratios(rows)
    assert list(ratios) == ["generated:4096,512,64"]
    ours = ratios["generated:4096,512,64"]
    assert ours["exact_vs_three_gemms"] == pytest.approx(1.0 / 1.2) and ours["exact_vs_eager"] == pytest.approx(
        1.1 / 1.2
    )
    assert ours["exact_memory_vs_eager"] == pytest.approx(2 / 3)
    assert {"log_prob_vs_three_gemms", "compressed_vs_eager", "compressed_vs_three_gemms"} <= ours.keys()
    lines = head_report.checks(rows, ratios)
    assert any(line.startswith("FAILS: generated:4096,512,64: exact_vs_eager 0.92") for line in lines)
    assert any(line.startswith("holds: generated:4096,512,64, exact, c ones: dh_err 1.0e-03") for line in lines)
    pictures = head_report.pictures(tmp_path, rows, "made up")
    assert [p.name for p in pictures] == ["head.png", "head_errors.png"]
    assert all(p.stat().st_size > 20_000 for p in pictures)


def test_quick_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(head, "_parse", lambda name, config: ("generated", 128, 1024, 32))
    path, impls = tmp_path / "head.json", ["gemms", "eager", "exact", "exact-log-prob", "cce"]
    bench.bench(bench.BenchConfig(name="head", quick=True, json=path, impls=impls, threads=1))
    record = json.loads(path.read_text())
    assert {"name", "machine", "versions", "rows", "ratios", "skipped", "profiles"} <= record.keys()
    assert record["skipped"] == {"cce": "compiles for half a minute; not in --quick"}
    assert all(row.keys() >= CONTRACT for row in record["rows"])
    assert all(not isinstance(v, (dict, list)) for row in record["rows"] for v in row.values())
    assert {(r["key"], r["coefficients"]) for r in record["rows"]} == {("gemms", "ones")} | {
        (key, kind) for key in impls[1:-1] for kind in head_inputs.KINDS
    }
    for row in record["rows"]:
        assert row["ms_min"] <= row["ms"] <= row["ms_max"] and row["runs"] == 3
        if row["key"].startswith("exact"):
            assert row["logprob_err"] < 1e-4 and row["dh_err"] < 0.01 and row["columns_kept"] == 1.0
    assert record["ratios"]["generated:512,8192,256"].keys() >= {"exact_vs_eager", "exact_vs_three_gemms"}
    assert (tmp_path / "head.png").stat().st_size > 5000


def test_states_of_a_model_on_traces(tmp_path):
    """More tokens than the window: extended, and said."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.conftest import character_tokenizer

    tokenizer = character_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    row = {"problem": "What is 1 + 1?", "trace": "<think>\n" + "one and one " * 20 + "\n</think>\n2", "answer": "2"}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 2)
    data, text = head_inputs.real(str(tmp_path / "model"), [str(tmp_path / "rows.jsonl")], 300)
    assert (
        data["h"].shape == (300, 32) and data["h"].dtype == torch.bfloat16 and data["w"].shape == (len(tokenizer), 32)
    )
    assert "2 document(s)" in text and "extended from 64" in text and "yarn" in text
    with pytest.raises(Refusal, match="accepted: 5,000 or more"):
        head_inputs.real(str(tmp_path / "model"), [str(tmp_path / "rows.jsonl")], 5000)


def test_the_experiment_runs_in_lockstep(tmp_path):
    if why := head_peers.missing("compressed"):
        pytest.skip(why)
    path = tmp_path / "r.json"
    bench.bench(bench.BenchConfig(name="experiments/compressed_sft", quick=True, json=path, threads=1))
    record = json.loads(path.read_text())
    assert [row["impl"] for row in record["rows"]] == ["exact", "compressed"] and len(record["steps"]) == 10
    assert all(line.startswith("holds") for line in record["checks"])
    first = record["steps"][0]
    assert first["loss_exact"] == first["loss_compressed"] and first["head_cosine_compressed"] > 0.9
    assert record["steps"][-1]["loss_exact"] != first["loss_exact"]
    assert (tmp_path / "compressed_sft.png").stat().st_size > 20_000
