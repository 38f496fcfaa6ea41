"""Slow references of every policy, written as loops over rows, heads and queries from the papers alone.

A policy here is an attention function over one whole sequence: it is handed all queries, keys and values of a layer at
once, walks through the queries in order, lets each see just what the policy would have held when it came, and writes
down what was held. One uncached forward of the model through such a function (`run_policy`) gives both the logits and
the held positions that a cache of that policy must reproduce. Every run is of one row without padding.
"""

import contextlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from models import Trace
from transformers import AttentionInterface, PreTrainedModel


ATTENTION_NAME = "loop_written_reference"
# Scores nearer than this may rank either way in float32.
TIE = 1e-5


@contextlib.contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run a model with another attention implementation for a while."""
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


@torch.no_grad()
def run_policy(model: PreTrainedModel, tokens: torch.Tensor, policy: Any) -> torch.Tensor:
    """
    One uncached forward of `tokens` `(length,)` under a policy; returns logits `(length, vocabulary)`.

    `policy.attend` is given the index of a layer, its queries `(heads, length, head_dim)`, its keys and values
    `(kv_heads, length, head_dim)`, and what logits are multiplied by. It returns what attention does, as the queries.
    """

    def attend(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **named: Any
    ) -> tuple[torch.Tensor, None]:
        """The model's own mask is not looked at."""
        assert query.shape[0] == 1, "the references run one row"
        output = policy.attend(module.layer_idx, query[0], key[0], value[0], named["scaling"])
        return output.transpose(0, 1)[None].contiguous(), None

    functions = patch.dict(AttentionInterface._global_mapping, {ATTENTION_NAME: attend})
    with functions, attention_implementation(model, ATTENTION_NAME):
        return model(input_ids=tokens[None], use_cache=False).logits[0]


class Rotation:
    """Rotary embedding at any positions, by the model's own modules, for keys and queries that carry none."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.embedding = model.model.rotary_emb
        self.compute = type(self.embedding).forward
        self.apply = sys.modules[type(model).__module__].apply_rotary_pos_emb

    def __call__(self, states: torch.Tensor, positions: list[int]) -> torch.Tensor:
        """States `(heads, length, head_dim)`, rotated to one position for each token."""
        cos, sin = self.compute(self.embedding, states, torch.tensor([positions]))
        rotated, _ = self.apply(states[None], states[None], cos, sin)
        return rotated[0]


@contextlib.contextmanager
def without_rotation(model: PreTrainedModel) -> Iterator[None]:
    """Run a model so that its attention function receives queries and keys from before the rotary embedding."""
    embedding = model.model.rotary_emb
    compute = type(embedding).forward

    def no_rotation(states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = compute(embedding, states, position_ids)
        return torch.ones_like(cos), torch.zeros_like(sin)

    embedding.forward = no_rotation
    try:
        yield
    finally:
        del embedding.forward


def attend_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Softmax attention of the queries of one group at one token `(group, head_dim)` to keys and values
    `(seen, head_dim)`: output `(group, head_dim)` and probabilities `(group, seen)`.
    """
    logits = query.float() @ key.float().T * scaling
    weights = (logits - logits.max(dim=-1, keepdim=True).values).exp()
    probabilities = weights / weights.sum(dim=-1, keepdim=True)
    return (probabilities @ value.float()).to(query.dtype), probabilities


@dataclass
class MaskPolicy:
    """The sequence with some keys hidden from some queries, nothing more."""

    masks: list[torch.Tensor] | None = None  # by layer (kv_heads, length, length): who sees what; None hides nothing

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        kv_heads, length, _ = key.shape
        is_seen = torch.ones(kv_heads, length, length, dtype=torch.bool) if self.masks is None else self.masks[layer]
        group = query.shape[0] // kv_heads
        key, value, is_seen = (each.repeat_interleave(group, dim=0) for each in (key, value, is_seen.tril()))
        logits = (query.float() @ key.float().mT * scaling).masked_fill(~is_seen, -math.inf)
        return (logits.softmax(dim=-1) @ value.float()).to(query.dtype)


def masks_of(trace: Trace, row: int, kv_heads: int) -> list[torch.Tensor]:
    """For each layer `(kv_heads, length, length)`: what each query of a row could see.

    The prompt's queries see every earlier token. A later query sees what was held before its step, and the tokens of
    its own step up to itself.
    """
    prompt = trace.lengths[row]
    length = prompt + sum(trace.pieces)
    masks = []
    for layer in range(len(trace.positions[0])):
        mask = torch.zeros(kv_heads, length, length, dtype=torch.bool)
        mask[:, :prompt] = torch.ones(prompt, length, dtype=torch.bool).tril()
        for head in range(kv_heads):
            start = prompt
            for step, piece in enumerate(trace.pieces):
                held = trace.held(step, layer, row, head)
                for query in range(start, start + piece):
                    mask[head, query, [*held, *range(start, query + 1)]] = True
                start += piece
        masks.append(mask)
    return masks


def ranked(scores: dict[int, float]) -> list[int]:
    """Positions from the highest score to the lowest; at equal scores the newer is the better."""
    return sorted(scores, key=lambda position: (scores[position], position), reverse=True)


def best(scores: dict[int, float], number: int) -> list[int]:
    """The `number` positions of highest score, in rising order."""
    return sorted(ranked(scores)[:number])


@dataclass
class HoldingPolicy:
    """Each token attends to what its head holds and to itself; from the end of the prompt on, heads evict after it.

    `held[layer][head][step]` are the positions held after the prompt (step 0) and after each later token. While one
    layer runs, `layer`, `query` (as queries came), `key` (as attention sees keys), `value` and `scaling` are its own.
    """

    prompt_length: int
    held: dict[int, list[list[list[int]]]] = field(default_factory=dict, init=False)

    def turn(self, states: torch.Tensor) -> torch.Tensor:
        """Queries or keys `(heads, length, head_dim)` as attention sees them."""
        return states

    def reaches(self, position: int) -> bool:
        """Whether a token was not lost on the way to the layer."""
        return True

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        kv_heads, length, head_dim = key.shape
        self.layer, self.scaling = layer, scaling
        self.query, self.key, self.value = query, self.turn(key), value
        groups = self.turn(query).view(kv_heads, -1, length, head_dim)
        output = torch.zeros_like(groups)
        held: list[list[int]] = [[] for _ in range(kv_heads)]
        self.held[layer] = [[] for _ in range(kv_heads)]
        given = torch.zeros(kv_heads, length, length, dtype=torch.float64)
        for position in filter(self.reaches, range(length)):
            held = [[*tokens, position] for tokens in held]
            for head, tokens in enumerate(held):
                output[head, :, position], probabilities = attend_one(
                    groups[head, :, position], self.key[head, tokens], value[head, tokens], scaling
                )
                given[head, position, tokens] = probabilities.double().mean(dim=0)
            if position >= self.prompt_length - 1:
                held = self.evict(position, held, given)
                for history, tokens in zip(self.held[layer], held, strict=True):
                    history.append(tokens)
        return output.view_as(query)

    def evict(self, position: int, held: list[list[int]], given: torch.Tensor) -> list[list[int]]:
        """
        What each head holds after the token at `position`, of what it `held` before, the token among it. `given`
        `(kv_heads, length, length)` is what each query so far gave to each key, the mean over its group.
        """
        raise NotImplementedError


def compare_with_policies(
    model: PreTrainedModel,
    trace: Trace,
    rows: list[torch.Tensor],
    policies: Sequence["HoldingPolicy | StreamingLLMPolicy"],
    tolerance: float = 1e-4,
) -> None:
    """Each row of a run with a cache against its policy alone: what is held after each step, and the logits."""
    ends = [sum(trace.pieces[:step]) for step in range(len(trace.pieces) + 1)]
    for index, (row, policy) in enumerate(zip(rows, policies, strict=True)):
        logits = run_policy(model, torch.cat([row, trace.tokens[index]]), policy)
        for layer, heads in policy.held.items():
            for head, history in enumerate(heads):
                for step, end in enumerate(ends):
                    held = trace.held(step, layer, index, head)
                    assert held == history[end], f"row {index}, layer {layer}, head {head}, step {step}"
        wanted = logits[[len(row) - 1 + end for end in ends]]
        torch.testing.assert_close(trace.logits[index], wanted, atol=tolerance, rtol=0)


@dataclass
class StreamingLLMPolicy:
    """
    The first tokens and the latest ones, at the positions they have inside the cache. The tokens of a forward pass
    attend to each other and to what was held before it.

    It must be run `without_rotation`, for it rotates queries and keys itself, anew for every query. `held` is as in
    `HoldingPolicy`, right after the last token of each forward pass.
    """

    rotation: Callable[[torch.Tensor, list[int]], torch.Tensor]
    pieces: list[int]  # tokens of each forward pass, the prompt first
    budget: int
    num_sink_tokens: int
    held: dict[int, list[list[list[int]]]] = field(default_factory=dict, init=False)

    def kept(self, length: int) -> list[int]:
        """What the cache holds after so many tokens."""
        first = length - (self.budget - self.num_sink_tokens)
        return [position for position in range(length) if position < self.num_sink_tokens or position >= first]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        kv_heads, length, head_dim = key.shape
        output = torch.empty(kv_heads, query.shape[0] // kv_heads, length, head_dim)
        self.held[layer] = [[self.kept(end) for end in range(self.pieces[0], length + 1)]] * kv_heads
        starts = [sum(self.pieces[:index]) for index, piece in enumerate(self.pieces) for _ in range(piece)]
        for position, start in enumerate(starts):
            seen = self.kept(start) + list(range(start, position + 1))
            in_cache = list(range(len(seen)))
            keys = self.rotation(key[:, seen], in_cache)
            queries = self.rotation(query[:, position : position + 1], in_cache[-1:])
            queries = queries.view(kv_heads, -1, head_dim)
            for head in range(kv_heads):
                output[head, :, position], _ = attend_one(queries[head], keys[head], value[head, seen], scaling)
        return output.view(-1, length, head_dim)


# Caches that keep what a score says (`PolicyCache`). Their scores are written here once, as loops over tokens. What a
# cache of them holds is worked out from these by `ScoredPolicy` below, and by the references of test_properties.py and
# test_soak.py.


@dataclass
class HeldTokens:
    """What one key head of a row holds when tokens have to go (any of them, if all heads of a layer hold the same)."""

    positions: list[int]  # rising
    keys: np.ndarray  # (held, head_dim) float64, as attention sees them
    values: np.ndarray
    attention: list[float]  # that the last queries gave to each token, the mean over them and the heads that count
    length: int  # tokens that the row has seen
    num_kept: int  # tokens that stay
    window: int = 0  # how many of the last queries `attention` is the mean of

    def is_recent(self, window_size: int) -> list[bool]:
        """Which tokens are among the last `window_size` of the row: half of what stays at most, but one at least."""
        window_size = min(window_size, max(self.num_kept // 2, 1))
        return [position >= self.length - window_size for position in self.positions]

    def passages(self, is_recent: list[bool], kernel_size: int) -> list[list[float]]:
        """For each token the attention of its passage, that of recent tokens as 0."""
        reach = kernel_size // 2
        given = [0.0 if recent else amount for recent, amount in zip(is_recent, self.attention, strict=True)]
        return [given[max(index - reach, 0) : index + reach + 1] for index in range(len(given))]


class ReferenceScore:
    """A method: what tokens are worth. Its arguments are those of the cache that it needs."""

    # How many of the last queries attention is the mean of; 0: it is not looked at; None: it is the sum over all.
    window_size: int | None = 0
    heads_share_tokens = False  # then attention is the mean over all heads
    has_exact_ties = True  # whether equal scores are so in float32 too, where the newer token is the better
    tie = TIE  # scores nearer than this, in proportion, may rank either way

    def window(self, length: int, mean: int) -> int | None:
        """The `window_size` for a prompt of so many tokens, of which layers keep `mean` on average."""
        return self.window_size

    def weight(self, age: int, window: int) -> float:
        """How much a query of the prompt counts that so many came after."""
        return 1.0

    def scores(self, held: HeldTokens) -> list[float]:
        """What each token is worth, infinity for what must stay."""
        raise NotImplementedError


@dataclass
class H2OScore(ReferenceScore):
    """The attention of all queries so far; the last tokens stay."""

    heavy_ratio: float = 0.5
    window_size = None

    def scores(self, held: HeldTokens) -> list[float]:
        first_recent = held.length - (held.num_kept - math.floor(Fraction(str(self.heavy_ratio)) * held.num_kept))
        pairs = zip(held.positions, held.attention, strict=True)
        return [math.inf if position >= first_recent else amount for position, amount in pairs]


@dataclass
class StreamingLLMScore(ReferenceScore):
    """The first tokens stay, and of the others the latest."""

    num_sink_tokens: int = 4
    heads_share_tokens = True

    def scores(self, held: HeldTokens) -> list[float]:
        return [math.inf if position < self.num_sink_tokens else position for position in held.positions]


@dataclass
class PyramidScore(ReferenceScore):
    """
    The attention of a window that is a share of the prompt, averaged over neighbours. Its newest query weighs
    `distance_weight`, the oldest 1, over the mean of all weights. The window and the first tokens stay.
    """

    recent_ratio: float | None = None
    window_size: int = 64
    kernel_size: int | None = None
    num_sink_tokens: int = 4
    distance_weight: float | None = None
    preset: str | None = None
    heads_share_tokens = True

    def __post_init__(self) -> None:
        defaults = (0.125, 13, 1.0) if self.preset is None else (0.2, 1, 1.2)
        for name, default in zip(("recent_ratio", "kernel_size", "distance_weight"), defaults, strict=True):
            if getattr(self, name) is None:
                setattr(self, name, default)

    def window(self, length: int, mean: int) -> int:
        number = math.floor(Fraction(str(self.recent_ratio)) * length) + 1
        if self.preset is None:
            number = min(number, self.window_size, (min(mean, length) + 1) // 2)
        return max(min(number, length), 1)

    def weight(self, age: int, window: int) -> float:
        newness = (window - 1 - age) / max(window - 1, 1)
        return (1 + (self.distance_weight - 1) * newness) / ((1 + self.distance_weight) / 2)

    def scores(self, held: HeldTokens) -> list[float]:
        first_recent = held.length - held.window
        stays = [position >= first_recent or position < self.num_sink_tokens for position in held.positions]
        averages = [sum(passage) / self.kernel_size for passage in held.passages(stays, self.kernel_size)]
        return [math.inf if always else mean for always, mean in zip(stays, averages, strict=True)]


@dataclass
class SnapKVScore(ReferenceScore):
    """The attention of the last queries, averaged over neighbours; the last tokens stay."""

    window_size: int = 64
    kernel_size: int = 5

    def scores(self, held: HeldTokens) -> list[float]:
        is_recent = held.is_recent(self.window_size)
        averages = [sum(passage) / self.kernel_size for passage in held.passages(is_recent, self.kernel_size)]
        return [math.inf if recent else average for recent, average in zip(is_recent, averages, strict=True)]


class TOVAScore(ReferenceScore):
    """The attention of the last query, which stays."""

    window_size = 1
    heads_share_tokens = True

    def scores(self, held: HeldTokens) -> list[float]:
        pairs = zip(held.is_recent(1), held.attention, strict=True)
        return [math.inf if recent else amount for recent, amount in pairs]


class KeyDiffScore(ReferenceScore):
    """How little a key points where the mean of all normalised keys does."""

    has_exact_ties = False  # of two keys each is as far from their mean as the other

    def scores(self, held: HeldTokens) -> list[float]:
        # A key of zeros points nowhere.
        directions = [key / math.sqrt(key @ key) if key.any() else key for key in held.keys]
        mean = sum(directions) / len(directions)
        return [-(direction @ mean) / math.sqrt(mean @ mean) for direction in directions]


class KnormScore(ReferenceScore):
    """The lower the norm of its key, the more a token is worth."""

    # The same token at another position has the same norm, but for rounding; the cache goes in steps.
    has_exact_ties = False
    tie = 1 / 4096

    def scores(self, held: HeldTokens) -> list[float]:
        return [-math.log2(math.sqrt(key @ key)) if key.any() else math.inf for key in held.keys]


@dataclass
class RKVScore(ReferenceScore):
    """The share of attention of a token or a neighbour, less how much its key is like others; the last stay."""

    window_size: int = 8
    kernel_size: int = 7
    importance_weight: float = 0.1
    similarity_threshold: float = 0.5
    has_exact_ties = False  # of two keys each points as much where the other does

    def scores(self, held: HeldTokens) -> list[float]:
        is_recent = held.is_recent(self.window_size)
        passages = held.passages(is_recent, self.kernel_size)
        given = [amount for recent, amount in zip(is_recent, held.attention, strict=True) if not recent]
        redundancy, scores = self.redundancy(held.keys), []
        for index, recent in enumerate(is_recent):
            importance = max(passages[index]) / (sum(given) or 1.0)
            score = self.importance_weight * importance - (1 - self.importance_weight) * redundancy[index]
            scores.append(math.inf if recent else score)
        return scores

    def redundancy(self, keys: np.ndarray) -> list[float]:
        """Each token blames each other one for the cosine of their keys, but not the latest that is alike."""
        number = len(keys)
        blame = [0.0] * number
        for judge in range(number):
            cosines = []
            for judged in range(number):
                lengths = math.sqrt(keys[judge] @ keys[judge]) * math.sqrt(keys[judged] @ keys[judged])
                cosine = float(keys[judge] @ keys[judged]) / (lengths or 1.0)  # a key of zeros is like no other
                cosines.append(0.0 if judge == judged else cosine)
            alike = [judged for judged in range(number) if cosines[judged] > self.similarity_threshold]
            for judged in range(number):
                if judged not in alike[-1:]:
                    blame[judged] += cosines[judged] / number
        exponentials = [math.exp(amount) for amount in blame]
        return [exponential / sum(exponentials) for exponential in exponentials]


# For each cache of the package, by name, its score as it is written here.
SCORES: dict[str, type[ReferenceScore]] = {
    "H2OCache": H2OScore,
    "StreamingLLMCache": StreamingLLMScore,
    "PyramidCache": PyramidScore,
    "SnapKVCache": SnapKVScore,
    "PyramidKVCache": SnapKVScore,
    "TOVACache": TOVAScore,
    "KeyDiffCache": KeyDiffScore,
    "KnormCache": KnormScore,
    "RKVCache": RKVScore,
}


def score_of(cache_class: type, settings: dict[str, Any]) -> ReferenceScore:
    """The score of a cache with these arguments of its constructor."""
    score_class = SCORES[cache_class.__name__]
    known = inspect.signature(score_class).parameters
    return score_class(**{name: value for name, value in settings.items() if name in known})


def choose(
    scores: dict[int, float], number: int, observed: set[int], has_exact_ties: bool = True, tie: float = TIE
) -> set[int]:
    """The `number` positions of highest score, the newer of equals (`has_exact_ties`, `tie`: see `ReferenceScore`).

    Of near ties, which float32 may rank otherwise, those that the cache was observed to hold come first.
    """
    order = ranked(scores)
    if number <= 0 or number >= len(order):
        return set(order if number > 0 else ())
    lowest, next_lower = scores[order[number - 1]], scores[order[number]]
    tolerance = 0.0 if math.isinf(lowest) else tie * max(1.0, abs(lowest))
    if math.isinf(lowest) or (has_exact_ties and lowest == next_lower) or lowest - next_lower > tolerance:
        return set(order[:number])
    certain = [position for position in order if scores[position] > lowest + tolerance]
    near = [position for position in order if abs(scores[position] - lowest) <= tolerance]
    near.sort(key=lambda position: position not in observed)
    return set((certain + near)[:number])


@dataclass
class ScoredPolicy(HoldingPolicy):
    """
    A prompt loses at once what a score ranks lowest. Generated tokens come in until `eviction_interval` of them exceed
    what a layer keeps, and then as many go.

    Where scores are the same within rounding, it goes along with what row `row` of `trace` held, if there is one.
    """

    score: ReferenceScore
    kept: list[int]  # by layer
    eviction_interval: int
    trace: Trace | None = None
    row: int = 0
    attention: torch.Tensor | None = field(default=None, init=False)  # (kv_heads, length)

    def observe(self, position: int, given: torch.Tensor) -> None:
        """Takes down what the last queries give to each token; to be called after each, with arguments of `evict`."""
        if not self.score.window_size:
            return
        if self.score.heads_share_tokens:
            given = given.mean(dim=0).expand_as(given)
        window = self.window
        if position < self.prompt_length:
            first = max(position + 1 - window, 0)
            weights = [self.score.weight(position - row, window) for row in range(first, position + 1)]
            rows = given[:, first : position + 1] * torch.tensor(weights)[:, None]
            self.attention = rows.sum(dim=1) / window
        else:
            self.attention = self.attention * (1 - 1 / window) + given[:, position] / window

    @property
    def window(self) -> int:
        """How many queries count."""
        return self.score.window(self.prompt_length, sum(self.kept) // len(self.kept))

    def worth(self, position: int, head: int, tokens: list[int]) -> dict[int, float]:
        """What each token that a head holds is worth."""
        attention = self.attention[head, tokens].tolist() if self.score.window_size else []
        keys, values = (states[head, tokens].double().numpy() for states in (self.key, self.value))
        held = HeldTokens(tokens, keys, values, attention, position + 1, self.kept[self.layer], self.window)
        return dict(zip(tokens, self.score.scores(held), strict=True))

    def evict(self, position: int, held: list[list[int]], given: torch.Tensor) -> list[list[int]]:
        self.observe(position, given)
        number, step = self.kept[self.layer], position + 1 - self.prompt_length
        if len(held[0]) <= number + (self.eviction_interval - 1 if step else 0):
            return held
        kept, ties = [], (self.score.has_exact_ties, self.score.tie)
        for head, tokens in enumerate(held):
            observed = [] if self.trace is None else self.trace.held(step, self.layer, self.row, head)
            kept.append(sorted(choose(self.worth(position, head, tokens), number, set(observed), *ties)))
        return kept


@dataclass
class PrunedPolicy(ScoredPolicy):
    """PyramidInfer given a model: only what a layer keeps of the prompt reaches the next one."""

    def __post_init__(self) -> None:
        self.passed_on = list(range(self.prompt_length))

    def reaches(self, position: int) -> bool:
        return position >= self.prompt_length or position in self.passed_on

    def evict(self, position: int, held: list[list[int]], given: torch.Tensor) -> list[list[int]]:
        held = super().evict(position, held, given)
        if position == self.prompt_length - 1:
            self.passed_on = held[0]
        return held
