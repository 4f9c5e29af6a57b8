"""Completions from the training weights: a prompt's keys and values are computed once for its group, slots refill.

A fixed number of slots decode together; one that ends takes the next completion in line. Every completion draws from a
random stream of its own (Philox, keyed by seed and number), so what it says depends neither on its slot nor on who
decodes beside it, but for the rounding of matrix products, which may differ with the number of rows. Attention is `varlen_attention` over the slots' caches: one query a slot, no padding, no mask.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from longtrace import kernels as K
from longtrace.kernels.head.gemm import HeadGemm
from longtrace.kernels.head.spec import compute_dtype
from longtrace.kernels.layers.decode import DecodeStack
from longtrace.kernels.linear import PackedLinear, packs

from .config import NonFinite, Refusal
from .model import Model, head_of

HEAD_ROWS = 64  # the head multiplies this many rows a call: a row's logits do not depend on how many there are
PREFILL = 16_384  # prompt tokens computed in one row, but for a longer prompt
BLOCK = 256  # probabilities summed at once when one is drawn


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: softmax(logits / temperature), cut to top_k tokens (0 = all) and top_p of the mass."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()  # strings that end a completion; they stay in its text


@dataclass
class Completion:
    """What one sample wrote."""

    tokens: list[int]  # the end token included
    log_probs: list[float]  # of each token under softmax(logits / temperature), whatever top_k and top_p
    finished: bool  # False: cut off at max_new_tokens

    @property
    def outcome(self) -> str:
        return "finished" if self.finished else "cut off"


@dataclass
class _Sample:
    """A completion in the making."""

    group: int
    number: int  # its place in the answer
    random: np.random.Generator
    slot: int = -1
    length: int = 0  # tokens whose keys and values are in the slot
    done: Completion = field(default_factory=lambda: Completion([], [], False))


class SlotCache(Cache):
    """Keys and values of every layer: `slots` stretches of `capacity` tokens, each one document of a packed row.

    As `prefill` it hands a packed row's own keys and values through and keeps them; as slots it writes one token a slot
    and hands out everything, the gaps being documents without a query.
    """

    def __init__(self, slots: int, capacity: int):
        super().__init__(layers=[])
        self.slots, self.capacity = slots, capacity
        self.keys: dict[int, torch.Tensor] = {}  # layer: (slots * capacity, kv heads, D)
        self.values: dict[int, torch.Tensor] = {}
        self.at: torch.Tensor | None = None  # where the step's tokens go; None = prefill
        self.prefilled: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if self.at is None:
            self.prefilled[layer_idx] = key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)
            return key_states, value_states
        handed = []
        for held, states in ((self.keys, key_states), (self.values, value_states)):
            held[layer_idx].index_copy_(0, self.at, states[0].transpose(0, 1))
            handed.append(held[layer_idx].transpose(0, 1)[None])
        return tuple(handed)

    def prompt(self, start: int, end: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """The prefilled tokens [start, end) of every layer."""
        return {layer: (k[start:end].clone(), v[start:end].clone()) for layer, (k, v) in self.prefilled.items()}

    def fill(self, slot: int, prompt: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copies a prompt into the slot's first tokens."""
        for layer, (k, v) in prompt.items():
            for held, states in ((self.keys, k), (self.values, v)):
                if layer not in held:
                    held[layer] = states.new_zeros(self.slots * self.capacity, *states.shape[1:])
                start = slot * self.capacity
                held[layer][start : start + len(states)] = states

    # the mask's view: a packed row, whose documents `varlen_attention` is told apart
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length, layer_idx: int = 0) -> tuple[int, int]:
        return (query_length if isinstance(query_length, int) else len(query_length)), 0

    @property
    def is_compileable(self) -> bool:
        return False


class Engine:
    """Samples from a model that attends by `attn_implementation="longtrace"` (see `load_model`), with its weights as
    they are now. `slots`: completions decoded at once; their caches take slots x (prompt + max_new_tokens) tokens."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, slots: int = 64):
        self.model, self.tokenizer, self.slots = model, tokenizer, slots

    @classmethod
    def of(cls, model: Model, slots: int = 64) -> Engine:
        return cls(model.base, model.tokenizer, slots)

    @property
    def ends(self) -> set[int]:
        """Tokens that end a completion."""
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, (list, tuple)) else [ends]) | {self.tokenizer.eos_token_id}
        return ends - {None}

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        samples: int = 1,
        seed: Sequence[int] = (0,),
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Completion]]:
        """`samples` completions of each prompt (token ids), in order.

        seed: integers; completion n of prompt g draws from Philox(seed, g, n). progress(completions ended, tokens written) is called at every
        step, and may raise. Raises Refusal for an empty prompt, or prompt and completion beyond the model's context.
        """
        if not prompts:
            return []
        longest = max(map(len, prompts))
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if min(map(len, prompts)) == 0:
            raise Refusal("a prompt without tokens; accepted: at least one")
        if context and longest + sampling.max_new_tokens > context:
            raise Refusal(
                f"--max-new-tokens {sampling.max_new_tokens:,}: with a prompt of {longest:,} tokens more than the model's "
                f"context; accepted: up to {context - longest:,}"
            )
        training = self.model.training
        self.model.eval()
        try:
            return _Run(self, prompts, sampling, samples, seed, longest, progress).done()
        finally:
            self.model.train(training)


class _Run:
    """One call of `generate`."""

    def __init__(self, engine: Engine, prompts, sampling: Sampling, samples: int, seed, longest: int, progress):
        self.model, self.tokenizer, self.ends = engine.model, engine.tokenizer, engine.ends
        self.device = next(self.model.parameters()).device
        self.prompts, self.sampling, self.progress = prompts, sampling, progress
        self.groups = [
            [_Sample(g, n, np.random.Generator(np.random.Philox(np.random.SeedSequence([*seed, g, n])))) for n in range(samples)]
            for g in range(len(prompts))
        ]  # fmt: skip
        self.waiting = deque(sample for group in self.groups for sample in group)
        slots = min(engine.slots, len(self.waiting))
        self.cache = SlotCache(slots, longest + sampling.max_new_tokens)
        self.free = list(range(slots))[::-1]
        self.active: list[_Sample] = []
        self.ended = self.written = 0  # completions, tokens
        self.head = head_of(self.model)
        weight, bias = self.head.weight, self.head.bias
        self.product = (
            partial(PackedLinear([weight]), fp32=True) if packs(weight) else HeadGemm(weight, HEAD_ROWS).logits
        )
        self.bias = None if bias is None else bias.to(compute_dtype(weight.dtype))
        body = self.model.base_model
        self.stack = DecodeStack(body) if DecodeStack.serves(body) else None
        self.prompt_of: dict[int, tuple[dict, torch.Tensor]] = {}  # group: its keys and values, its last token's logits

    def done(self) -> list[list[Completion]]:
        while self.waiting or self.active:
            if self.waiting and self.free:
                self._admit()
            if self.active:
                self._step()
            if self.progress:
                self.progress(self.ended, self.written)
        return [[sample.done for sample in group] for group in self.groups]

    def _admit(self) -> None:
        """Next in line into the free slots; prompts not seen yet are computed together, as one packed row."""
        coming = [self.waiting.popleft() for _ in range(min(len(self.free), len(self.waiting)))]
        new = [g for g in dict.fromkeys(s.group for s in coming) if g not in self.prompt_of]
        longest = max((len(self.prompts[g]) for g in new), default=0)
        for row in K.pack([len(self.prompts[g]) for g in new], max(longest, PREFILL)):
            self._prefill([new[i] for i in row])
        for sample in coming:
            sample.slot = self.free.pop()
            sample.length = len(self.prompts[sample.group])
            self.cache.fill(sample.slot, self.prompt_of[sample.group][0])
        logits = torch.cat([self.prompt_of[s.group][1] for s in coming])
        still_to_come = {s.group for s in self.waiting}
        self.prompt_of = {g: kept for g, kept in self.prompt_of.items() if g in still_to_come}
        self.active += coming
        self._extend(coming, logits)

    def _prefill(self, groups: list[int]) -> None:
        lengths = np.array([len(self.prompts[g]) for g in groups])
        starts = np.concatenate([[0], np.cumsum(lengths)])
        ids = np.concatenate([np.asarray(self.prompts[g], dtype=np.int64) for g in groups])
        positions = np.concatenate([np.arange(n) for n in lengths])
        self.cache.at = None
        hidden = self._body(ids, positions, starts, int(lengths.max()), starts, int(lengths.max()))
        logits = self._logits(hidden[torch.from_numpy(starts[1:] - 1).to(self.device)])
        for i, group in enumerate(groups):
            self.prompt_of[group] = self.cache.prompt(starts[i], starts[i + 1]), logits[i : i + 1]
        self.cache.prefilled = {}

    def _step(self) -> None:
        """One token for every active slot."""
        self.active.sort(key=lambda s: s.slot)
        slots = np.array([s.slot for s in self.active])
        lengths = np.array([s.length for s in self.active])
        tokens = np.array([s.done.tokens[-1] for s in self.active])
        at = slots * self.cache.capacity + lengths
        # the caches' row as documents: the gap before a slot's keys (no query), its keys (one query), ..., the last gap
        edges = np.stack([slots * self.cache.capacity, at + 1], 1).reshape(-1)
        keys = np.concatenate([[0], edges, [self.cache.slots * self.cache.capacity]])
        queries = np.repeat(np.arange(len(slots) + 1), 2)
        if self.stack is not None:
            arrays = (torch.from_numpy(x) for x in (tokens, lengths, at, queries, keys))
            hidden = self.stack(*arrays, self.cache.keys, self.cache.values)
        else:
            self.cache.at = torch.from_numpy(at).to(self.device)
            hidden = self._body(tokens, lengths, queries, 1, keys, self.cache.capacity)
        for sample in self.active:
            sample.length += 1
        self._extend(list(self.active), self._logits(hidden))

    def _body(self, ids, positions, queries, longest_query: int, keys, longest_key: int) -> torch.Tensor:
        """(n, H) final hidden states of n tokens given as arrays; `queries`, `keys`: where documents start and end."""
        ids, positions = (torch.from_numpy(x).to(self.device)[None] for x in (ids, positions))
        queries, keys = (torch.from_numpy(x.astype(np.int32)).to(self.device) for x in (queries, keys))
        return self.model.base_model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            cu_seq_lens_q=queries,
            cu_seq_lens_k=keys,
            max_length_q=longest_query,
            max_length_k=longest_key,
        ).last_hidden_state[0]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, V) in fp32, over the temperature."""
        logits = self.product(hidden.to(self.head.weight.dtype))
        if self.head.logit_scale != 1.0:
            logits *= self.head.logit_scale
        if self.bias is not None:
            logits += self.bias
        if self.head.softcap:
            logits = self.head.softcap * torch.tanh(logits / self.head.softcap)
        return logits / self.sampling.temperature if self.sampling.temperature not in (0, 1) else logits

    def _extend(self, samples: list[_Sample], logits: torch.Tensor) -> None:
        """Draws a token for each sample; those that end leave their slots."""
        uniform = torch.tensor([s.random.random() for s in samples], dtype=torch.float64, device=self.device)
        tokens, log_probs = draw(logits, uniform, self.sampling)
        ended = []
        for sample, token, log_prob in zip(samples, tokens.tolist(), log_probs.tolist()):
            sample.done.tokens.append(token)
            sample.done.log_probs.append(log_prob)
            sample.done.finished = token in self.ends or self._stopped(sample.done.tokens)
            if sample.done.finished or len(sample.done.tokens) == self.sampling.max_new_tokens:
                ended.append(sample)
        for sample in ended:
            self.free.append(sample.slot)
            self.active.remove(sample)
        self.ended, self.written = self.ended + len(ended), self.written + len(samples)

    def _stopped(self, tokens: list[int]) -> bool:
        if not self.sampling.stop:
            return False
        # a token is a byte at least, so the string's last token and its bytes reach no further back
        reach = max(len(text.encode()) for text in self.sampling.stop) + 4
        tail = self.tokenizer.decode(tokens[-reach:])
        return any(text in tail for text in self.sampling.stop)


def draw(logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row: (tokens, log-probs) of logits (n, V), already over the temperature and overwritten, by inverting the
    cumulative distribution at `uniform` (n,) float64 in [0, 1). The log-probs are those of the whole softmax. Raises
    NonFinite."""
    best = logits.argmax(-1) if sampling.temperature == 0 else None
    p = logits.sub_(logits.amax(-1, keepdim=True)).exp_()  # times the whole, which the log-probs divide by
    ends = _ends(p)
    if bad := int((~ends[:, -1].isfinite()).sum()):  # a NaN, an infinity, or nothing above -inf
        raise NonFinite(
            f"the model's logits are not finite in {bad} of {len(p)} completions being written: its weights have diverged or "
            "overflow; checkpoints stay as they are (--resume PATH goes on from one, --lr sets a smaller step)"
        )
    if best is not None:
        tokens = best[:, None]
    elif sampling.top_k or sampling.top_p < 1:
        values, columns = _nucleus(p, ends[:, -1:], sampling.top_k, sampling.top_p)
        tokens = columns.gather(1, _invert(values, _ends(values), uniform)[:, None])
    else:
        tokens = _invert(p, ends, uniform)[:, None]
    return tokens[:, 0], (p.gather(1, tokens).log() - ends[:, -1:].log())[:, 0].to(logits.dtype)


def _blocks(p: torch.Tensor) -> torch.Tensor:
    """(n, blocks, BLOCK) of p (n, V), filled up with zeros."""
    short = -p.shape[1] % BLOCK
    return (torch.nn.functional.pad(p, (0, short)) if short else p).view(len(p), -1, BLOCK)


def _ends(p: torch.Tensor) -> torch.Tensor:
    """(n, blocks) float64: the sum of p (n, V) up to each block's end."""
    return _blocks(p).sum(-1).double().cumsum(-1)


def _nucleus(p: torch.Tensor, whole: torch.Tensor, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(probabilities, columns), largest first: the fewest that hold top_p of the mass, top_k at most, others 0."""
    vocabulary = p.shape[1]
    width = min(top_k or 1024, vocabulary)
    while True:
        best, columns = p.topk(width, -1)
        before = best.double().cumsum(-1) - best
        if top_k or width == vocabulary or bool((before[:, -1:] >= top_p * whole).all()):
            break
        width = min(8 * width, vocabulary)
    mass = before[:, -1:] + best[:, -1:] if top_k else whole  # top_p is a share of what top_k left
    return best.masked_fill(before >= top_p * mass, 0.0), columns


def _invert(p: torch.Tensor, ends: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """(n,) the first column where the cumulative sum of p (n, V) exceeds uniform x its total; ends: its `_ends`.

    Never a column of probability 0: what is looked for stays below the last sum.
    """
    wanted = _below(uniform * ends[:, -1], ends[:, -1])
    block = torch.searchsorted(ends, wanted[:, None], right=True)
    left = wanted - torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)[:, 0]
    inside = _blocks(p)[torch.arange(len(p), device=p.device), block[:, 0]].double().cumsum(-1)
    column = torch.searchsorted(inside, _below(left.clamp(min=0), inside[:, -1])[:, None], right=True)
    return (block * BLOCK + column)[:, 0]


def _below(wanted: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    return torch.minimum(wanted, torch.nextafter(limit, torch.zeros_like(limit)))
