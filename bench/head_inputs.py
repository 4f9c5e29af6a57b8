"""What the head benchmark runs on: hidden states, a head's weights and targets, real or generated to look like real.

How much a head costs and how well its gradients compress depends on the distributions it sees: random weights give a
flat softmax, which no trained model has. So the generated inputs follow `MEASURED`: the states of SmolLM2-135M-Instruct
(weights that passed through 4 bits) at 4,096 tokens of one deepseek-reasoner trace, V = 49,152, H = 576.

A row's logits are the sum of three parts, each a direction of h: how common a token is (the same for all rows: quantiles
of the measured mean logit), its context (clusters of a power-law spectrum, so that the tail is nearly low rank), and a
spike on V / 384 candidates of the context, in an order drawn for each row and scaled until the row has its entropy.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from longtrace.trainer.config import Refusal

Q = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
MEASURED = {
    "quantiles": Q,
    "p_max": (0.126, 0.161, 0.254, 0.431, 0.744, 0.952, 0.992),  # largest probability of a row
    "entropy": (0.067, 0.333, 1.239, 2.432, 3.430, 4.158, 4.502),  # nats
    "nll": (0.009, 0.050, 0.346, 1.379, 3.120, 5.431, 6.933),  # of the next token
    "nll_mean": 2.126,
    "columns_kept": {10: 0.051, 12: 0.101, 14: 0.187},  # columns with some p > 2^-n in a chunk of 1,024 rows
    "dropped_mass": 0.0085,  # mean over rows of what lies in the columns not kept at 2^-12
    # mean log p of the token at this rank
    "log_p_at_rank": {1: -0.91, 4: -3.93, 16: -6.16, 64: -8.43, 256: -10.7, 1024: -13.0, 4096: -15.6, 16384: -18.8},
    # median relative error of dW rows that are never kept, when clusters of h share their tail (`tail_error`)
    "tail_error": {1: 0.335, 16: 0.099, 64: 0.056, 128: 0.040},
}
# mean logit of a token over all rows, less its mean over tokens: quantiles of the token
COMMON = (
    (0, 1e-4, 1e-3, 1e-2, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 0.9999, 1),
    (-14, -10.99, -8.52, -5.81, -2.93, -1.56, -0.08, 1.44, 3.08, 6.34, 9.31, 11.16, 12.5),
)
ENTROPY = ((0.0, *Q, 1.0), (0.005, *MEASURED["entropy"], 6.0))
ROWS = 1024  # a chunk's rows wherever logits are held here

KINDS = ("ones", "sequence", "random", "sparse")


def coefficients(kind: str, T: int) -> Tensor:
    """(T,) fp32 weights of the tokens' NLL, of mean magnitude 1 / T.

    ones: the mean loss. sequence: one sign for each of 8 sequences (policy gradients, preferences). random: a sign for
    each token. sparse: ones at 1 % of the tokens, 0 elsewhere.
    """
    draw = torch.Generator().manual_seed(1)
    if kind == "ones":
        c = torch.ones(T)
    elif kind == "sequence":
        signs = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0])
        c = signs[torch.arange(T) * 8 // T]
    elif kind == "random":
        c = torch.randint(0, 2, (T,), generator=draw) * 2.0 - 1
    else:
        chosen = torch.randperm(T, generator=draw)[: max(1, T // 100)]
        c = torch.zeros(T)
        c[chosen] = T / len(chosen)
    return c / T


def _interpolate(table: tuple, u: Tensor) -> Tensor:
    x, y = (torch.tensor(column, dtype=torch.float32) for column in table)
    i = torch.searchsorted(x, u).clamp(1, len(x) - 1)
    return y[i - 1] + (u - x[i - 1]) / (x[i] - x[i - 1]) * (y[i] - y[i - 1])


def generate(T: int, V: int, H: int, seed: int = 0) -> dict[str, Tensor]:
    """{"h": (T, H), "w": (V, H), "y": (T,)}: bf16 states and weights whose softmax looks like a trained model's."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    clusters, candidates, within = 256, max(16, V // 384), 0.35
    variety = 0.5 - 0.13 * math.log(V / 49152)  # a larger vocabulary offers more candidates to a chunk
    common = 1.05 * _interpolate(COMMON, torch.rand(V, generator=draw))
    w = normal(V, H) / H**0.5
    w[:, 0] = 0  # the first coordinate carries `common`
    spectrum = torch.arange(1, H).float() ** -0.65
    spectrum /= spectrum.norm()
    centres = normal(clusters, H - 1) * spectrum
    cluster = torch.multinomial(1 / (torch.arange(clusters) + 2.7), T, True, generator=draw)
    context = (1 - within**2) ** 0.5 * centres[cluster] + within * normal(T, H - 1) * spectrum
    context *= 1.85 * H**0.5 * (0.2 * normal(T, 1)).exp()  # the context moves a row's logits by 1.85 nats, as measured
    words = torch.multinomial((variety * common).softmax(0), clusters * candidates, True, generator=draw)
    order = torch.rand(T, candidates, generator=draw).argsort(1)
    words = words.view(clusters, candidates)[cluster].gather(1, order)
    unit = w[:, 1:] / w[:, 1:].square().sum(1, keepdim=True)
    ladder, first = torch.zeros(T, H - 1), unit[words[:, 0]]
    for place in range(candidates):
        ladder.add_(unit[words[:, place]], alpha=max(0.0, 1 - 0.12 * math.log(1 + place * 49152 / V)))
    entropy = _interpolate(ENTROPY, torch.rand(T, 1, generator=draw))

    h, y = torch.zeros(T, H), torch.empty(T, dtype=torch.long)
    for rows in torch.arange(T).split(ROWS):
        base = (context[rows] @ w[:, 1:].T).add_(common)
        up, on = ladder[rows] @ w[:, 1:].T, first[rows] @ w[:, 1:].T
        low, high = torch.zeros(len(rows), 1), torch.full((len(rows), 1), 64.0)
        for _ in range(10):  # the entropy falls as candidates rise, and further as the first takes the lead
            middle = (low + high) / 2
            rise, lead = middle.clamp(max=6.0), (middle - 6.0).clamp(min=0)
            log_p = torch.addcmul(base, rise, up).addcmul_(lead, on).log_softmax(1)
            flat = -(log_p.exp() * log_p).sum(1, keepdim=True) > entropy[rows]
            low, high = torch.where(flat, middle, low), torch.where(flat, high, middle)
        h[rows, 1:] = context[rows] + rise * ladder[rows] + lead * first[rows]
        # the next token: drawn from the softmax, a little sharper (Gumbel)
        y[rows] = (1.07 * log_p - torch.empty_like(log_p).exponential_(generator=draw).log()).argmax(1)
    size = 1.28 * h.norm(dim=1).mean()  # 62 % of the measured |h|^2 is its mean
    h[:, 0], w[:, 0] = size, common / size
    return {"h": h.bfloat16(), "w": w.bfloat16(), "y": y}


def real(model: str, data: list[str], T: int) -> tuple[dict[str, Tensor], str]:
    """The states of `model` at the first T tokens of the traces, one document each, and in words how they were made.

    A window shorter than a document is extended by yarn, as training would. Raises Refusal for too little text.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from longtrace.trainer.rope import extend_rope
    from longtrace.trainer.rows import read_rows

    if not (Path(model) / "config.json").is_file():
        raise Refusal(f"--model {model}: found no config.json there; accepted: a Hugging Face model folder")
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    documents, have = [], 0
    for row in (row for spec in data for row in read_rows(spec)):
        text = "\n".join(message["content"] for message in row.messages)
        ids = tokenizer(text, verbose=False)["input_ids"][: T - have + 1]
        if len(ids) > 1:
            documents.append(ids)
            have += len(ids) - 1
        if have == T:
            break
    if have < T:
        raise Refusal(f"--data: found {have:,} tokens; accepted: {T:,} or more")
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    rope = extend_rope(config.get_text_config(), max(map(len, documents)), "auto")
    hf = AutoModelForCausalLM.from_pretrained(
        model, config=config, dtype=torch.bfloat16, attn_implementation="sdpa", trust_remote_code=False
    ).eval()
    with torch.no_grad():
        h = torch.cat([hf.base_model(torch.tensor([ids[:-1]])).last_hidden_state[0] for ids in documents])
    y = torch.cat([torch.tensor(ids[1:]) for ids in documents])
    name = Path(model).resolve().name
    text = f"bf16 states of {name} at {T:,} tokens, {len(documents)} document(s) of {Path(data[0]).stem}; {rope}"
    return {"h": h, "w": hf.get_output_embeddings().weight.detach().clone(), "y": y}, text


# ----------------------------------------------------------------------------------------------------------------------
# What the inputs look like


def profile(h: Tensor, w: Tensor, y: Tensor, ranks: tuple[int, ...] = (1, 16, 64)) -> dict:
    """The quantities of MEASURED for these inputs, in fp32; `ranks`: the clusters of `tail_error`."""
    h, w = h.float(), w.float()
    V, q = w.shape[0], torch.tensor(Q)
    places = [r for r in MEASURED["log_p_at_rank"] if r <= V]
    rows_of = {name: [] for name in ("p_max", "entropy", "nll", "dropped", "sorted")}
    kept: dict[int, list[float]] = {10: [], 12: [], 14: []}
    exact, short, never = torch.zeros_like(w), {k: torch.zeros_like(w) for k in ranks}, torch.ones(V, dtype=torch.bool)
    for rows in torch.arange(len(h)).split(ROWS):
        log_p = (h[rows] @ w.T).log_softmax(1)
        p = log_p.exp()
        rows_of["p_max"].append(p.amax(1))
        rows_of["entropy"].append(-(p * log_p).sum(1))
        rows_of["nll"].append(-log_p.gather(1, y[rows, None])[:, 0])
        rows_of["sorted"].append(log_p[::8].sort(1, descending=True).values[:, [r - 1 for r in places]])
        largest = p.amax(0)
        for n, found in kept.items():
            found.append((largest > 2.0**-n).float().mean().item())
        keep = largest > 2.0**-12
        keep[y[rows]] = True
        never &= ~keep
        p[:, keep] = 0
        mass = p.sum(1, keepdim=True)
        rows_of["dropped"].append(mass[:, 0])
        exact += p.T @ h[rows]
        for k, total in short.items():
            member = F.one_hot(_clusters(h[rows], k), k).float()
            shared = member.T @ p
            total += (shared / shared.sum(1, keepdim=True).clamp_min(1e-30)).T @ (member.T @ (mass * h[rows]))
    joined = {name: torch.cat(parts) for name, parts in rows_of.items()}
    size = exact[never].norm(dim=1)
    return {
        **{name: joined[name].quantile(q).tolist() for name in ("p_max", "entropy", "nll")},
        "nll_mean": joined["nll"].mean().item(),
        "columns_kept": {n: sum(found) / len(found) for n, found in kept.items()},
        "dropped_mass": joined["dropped"].mean().item(),
        "log_p_at_rank": dict(zip(places, joined["sorted"].mean(0).tolist())),
        "tail_error": {k: ((t - exact)[never].norm(dim=1) / size).median().item() for k, t in short.items()},
    }


def _clusters(h: Tensor, k: int) -> Tensor:
    """(rows,) the cluster of each row: spherical k-means, six rounds from k rows."""
    x = F.normalize(h, dim=1)
    centres = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:k]]
    for _ in range(6):
        sums = torch.zeros_like(centres).index_add_(0, (x @ centres.T).argmax(1), x)
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centres)
    return (x @ centres.T).argmax(1)
