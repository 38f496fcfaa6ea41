"""Random sequences of tokens and of operations on rows, against a reference that holds triples in Python lists.

The reference holds, for each layer, row and KV head, a list of (position, key, value) triples and applies each
method's rules to it one token at a time, in float64. After every operation the cache must hold the same triples, and
every attention output must be that of the triples which the query may see. A `crop` of tokens that were evicted must
raise the documented error and change nothing. Recording, copies and files have test files of their own.

A failing sequence is printed as a `Setup` and a list of operations, which `run_sequence` repeats. More sequences:
`PYRAMID_EXAMPLES=3000 pytest tests/test_properties.py`.
"""

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from caches import CACHE_CASES, CacheCase, parameters_of, parametrize_cases
from hypothesis import given
from hypothesis import strategies as st
from models import random_tokens, tiny_model
from reference import HeldTokens, choose, score_of
from synthetic import SyntheticModel

from pyramid_cache import H2OCache, PyramidCache, SnapKVCache
from pyramid_cache.engine.budget import Budget
from pyramid_cache.engine.cache import CompressedCache


MAX_ROWS = 4


@dataclass(frozen=True)
class Setup:
    """A cache and what drives it: a model of some sizes, and `padding` columns in front of up to three rows.

    Attributes:
        group: Query heads of each KV head.
        padding: The least of a batch is taken off all of its rows.
        with_mask: Whether there is a mask where none is needed.
        seed: Of queries, keys and values.
    """

    cache_class: type[CompressedCache]
    settings: dict[str, Any]
    num_layers: int = 1
    kv_heads: int = 1
    group: int = 1
    head_dim: int = 4
    batch_size: int = 1
    padding: tuple[int, ...] = (0, 0, 0)
    attention: str = "sdpa"
    with_mask: bool = False
    seed: int = 0


# The reference.

# For each KV head of a row, the positions that the cache says it holds: looked at only where scores nearly tie.
Observed = list[set[int]]


@dataclass(frozen=True, eq=False)
class Triple:
    """One token in one KV head of one layer, as it arrived, before any rotation; key and value are `(head_dim,)`."""

    position: int
    key: np.ndarray
    value: np.ndarray

    def __deepcopy__(self, memo: dict[int, Any]) -> "Triple":
        return self


def attend(query: np.ndarray, triples: Sequence[Triple], allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Softmax attention in float64.

    Args:
        query: `(group, num_queries, head_dim)`.
        triples: What there is to see.
        allowed: `(num_queries, triples)`, who sees what.

    Returns:
        Output `(group, num_queries, head_dim)` and probabilities `(group, num_queries, triples)`.
    """
    keys = np.array([triple.key for triple in triples])
    values = np.array([triple.value for triple in triples])
    logits = np.where(allowed, query @ keys.T / math.sqrt(query.shape[-1]), -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities = weights / weights.sum(axis=-1, keepdims=True)
    return probabilities @ values, probabilities


class ReferenceLayer:
    """What one layer holds of one row: what a score ranks highest, of a prompt at once, of generated tokens when as
    many have come as may wait.

    Attributes:
        held: For each KV head its triples in order of position.
        attention: For each KV head what the tokens at these positions were given.
        length: Tokens that the row has seen.
        kept: Tokens that may stay; None: all.
        window: The last queries that count.
        num_spare: Generated tokens that may wait beyond those that may stay.
        has_slots: Whether some row of the batch has exceeded what may stay since the layer was empty.
        has_exceeded: Whether this row did, at the last update.
    """

    def __init__(self, setup: Setup, policy: Any, layer_idx: int) -> None:
        self.setup, self.policy, self.layer_idx = setup, policy, layer_idx
        self.score = score_of(setup.cache_class, setup.settings)
        self.held: list[list[Triple]] = [[] for _ in range(setup.kv_heads)]
        self.attention: list[dict[int, float]] = [{} for _ in self.held]
        self.kept: int | None = None
        self.window: int | None = None
        self.has_slots = self.has_exceeded = False
        self.length = self.num_spare = 0

    @property
    def num_held(self) -> int:
        return len(self.held[0])

    def begin(self) -> None:
        """All that has been seen so far is a prompt. Counts what the layer keeps of it."""
        amount, num_layers = self.setup.settings.get("budget", 0.4), self.setup.num_layers
        if isinstance(amount, float) and amount == 1.0:
            return
        if isinstance(amount, int):
            mean = amount
        elif self.setup.cache_class is PyramidCache:  # whose layers share what is left of a token
            mean = math.floor(Fraction(str(amount)) * self.length * num_layers + Fraction(1, 2)) // num_layers
        else:
            mean = max(math.floor(Fraction(str(amount)) * self.length), 1)
        has_share = self.setup.cache_class is PyramidCache and not isinstance(amount, int)
        budget = Budget("fraction", amount) if has_share else Budget("tokens", mean)
        self.kept = max(self.policy.num_tokens(self.length, budget, self.layer_idx, num_layers), 1)
        self.window = self.score.window(self.length, mean)

    def update(
        self, new: list[list[Triple]], query: np.ndarray, is_step: bool, observed: Observed
    ) -> np.ndarray | None:
        """Attention of the row's new tokens, and the eviction that follows.

        Args:
            new: For each KV head the new triples.
            query: `(kv_heads, group, new, head_dim)`.
            is_step: Whether this is a decode step.
            observed: What the cache holds afterwards.

        Returns:
            `(kv_heads, group, new, head_dim)`; None without new tokens.
        """
        self.length += len(new[0])
        self.num_spare = self.setup.settings.get("eviction_interval", 1) - 1 if is_step else 0
        if not is_step:
            self.begin()
        self.held = [old + triples for old, triples in zip(self.held, new, strict=True)]
        output = None
        if new[0]:
            output, probabilities = self.attend(query)
            self.note(probabilities, is_step)
        self.evict(observed)
        return output

    def attend(self, query: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Each query sees all that is held up to itself: output, and probabilities for each KV head; see `update`."""
        newest = np.arange(self.length - query.shape[2], self.length)
        results = []
        for head, triples in enumerate(self.held):
            positions = np.array([triple.position for triple in triples])
            results.append(attend(query[head], triples, positions <= newest[:, None]))
        return np.stack([output for output, _ in results]), [probabilities for _, probabilities in results]

    def note(self, probabilities: list[np.ndarray], is_step: bool) -> None:
        """
        Takes `(group, new, held)` attention probabilities of each KV head down. Each of the last queries takes over
        its share of the window.
        """
        if self.kept is None or self.score.window_size == 0:
            return
        window = self.window or len(probabilities[0][0])  # without a window all queries count, and nothing fades
        received = [heads.mean(axis=0)[-window:] for heads in probabilities]  # (new in the window, held)
        number, share_left = len(received[0]), 1.0
        weights = np.ones(number)
        if self.window is not None:
            weights = np.array([self.score.weight(number - 1 - row, window) for row in range(number)])
            weights = (np.ones(number) if is_step else weights) / window
            share_left = 1 - number / window
        for attention, triples, rows in zip(self.attention, self.held, received, strict=True):
            for triple, amount in zip(triples, (weights @ rows).tolist(), strict=True):
                attention[triple.position] = share_left * attention.get(triple.position, 0.0) + amount

    def evict(self, observed: Observed) -> None:
        """Drops what may not stay."""
        self.has_exceeded = self.kept is not None and self.num_held > self.kept + self.num_spare
        if self.has_exceeded:
            kept = [self.chosen(head, seen) for head, seen in enumerate(observed)]
            self.held = [
                [triple for triple in triples if triple.position in positions]
                for triples, positions in zip(self.held, kept, strict=True)
            ]

    def chosen(self, head: int, observed: set[int]) -> set[int]:
        """The positions that a head keeps of too many."""
        triples = self.held[head]
        positions = [triple.position for triple in triples]
        # Heads that share tokens go by the mean over all of them.
        given_ = self.attention if self.score.heads_share_tokens else [self.attention[head]]
        held = HeldTokens(
            positions,
            np.array([triple.key for triple in triples]),
            np.array([triple.value for triple in triples]),
            [math.fsum(each.get(position, 0.0) for each in given_) / len(given_) for position in positions],
            self.length,
            self.kept,
            self.window,
        )
        scores = dict(zip(positions, self.score.scores(held), strict=True))
        return choose(scores, self.kept, observed, self.score.has_exact_ties, self.score.tie)

    def take_back(self, num_tokens: int) -> None:
        """Forgets the newest tokens of a row of which nothing was evicted."""
        self.length -= num_tokens
        self.held = [triples[: self.length] for triples in self.held]
        self.attention = [
            {position: amount for position, amount in attention.items() if position < self.length}
            for attention in self.attention
        ]

    def compress(self, observed: Observed) -> None:
        """Drops what waited to be dropped."""
        self.begin()
        self.num_spare = 0
        self.evict(observed)


@dataclass(frozen=True)
class Chunk:
    """Tokens of one forward pass: `(layers, batch, kv_heads, [group,] columns, head_dim)` in float64."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray


class Reference:
    """All layers of all rows.

    Attributes:
        padding: For each row the columns before its tokens.
        layers: For each layer, what it holds of each row.
        num_seen: Columns seen, padding included.
    """

    def __init__(self, setup: Setup, cache: CompressedCache) -> None:
        self.setup = setup
        self.policy = cache.policy
        self.reset(setup.batch_size, setup.padding)

    def reset(self, batch_size: int, padding: tuple[int, ...]) -> None:
        self.padding = [columns - min(padding[:batch_size]) for columns in padding[:batch_size]]
        self.layers = [
            [ReferenceLayer(self.setup, self.policy, index) for _ in self.padding]
            for index in range(self.setup.num_layers)
        ]
        self.is_empty = True
        self.num_seen = 0

    @property
    def rows(self) -> range:
        return range(len(self.padding))

    def is_token(self, num_columns: int) -> torch.Tensor:
        """`(batch, num_columns)` bool, False for padding."""
        return torch.arange(num_columns) >= torch.tensor(self.padding)[:, None]

    def fitting(self, num_columns: int) -> int:
        """The next chunk's size: no chunk is padding in all rows."""
        return max(num_columns, min(self.padding) + 1 - self.num_seen)

    def update(self, chunk: Chunk, observed: list[list[Observed]]) -> list[list[np.ndarray | None]]:
        """Takes a chunk in; gives for each layer and row `(kv_heads, group, tokens, head_dim)`."""
        self.is_empty = False
        # One token in each row, which no row begins with.
        is_step = chunk.key.shape[3] == 1 and all(layer.length for layer in self.layers[0])
        outputs = [
            [
                layer.update(*self._tokens(chunk, index, row), is_step, observed[index][row])
                for row, layer in enumerate(layers)
            ]
            for index, layers in enumerate(self.layers)
        ]
        self._share()
        self.num_seen += chunk.key.shape[3]
        return outputs

    def _tokens(self, chunk: Chunk, layer_idx: int, row: int) -> tuple[list[list[Triple]], np.ndarray]:
        """The triples of one row of a chunk, for each KV head, and their queries."""
        before = self.num_seen - self.padding[row]
        first = max(-before, 0)
        pairs = zip(chunk.key[layer_idx, row], chunk.value[layer_idx, row], strict=True)
        triples = [
            [Triple(before + column, keys[column], values[column]) for column in range(first, len(keys))]
            for keys, values in pairs
        ]
        return triples, chunk.query[layer_idx, row, :, :, first:]

    def _share(self) -> None:
        """All rows of a layer have slots when one of them has exceeded what may stay."""
        for layers in self.layers:
            has_slots = any(layer.has_slots or layer.has_exceeded for layer in layers)
            for layer in layers:
                layer.has_slots = has_slots

    def map_rows(self, rows: list[int]) -> None:
        """The rows at these indices, copied."""
        if self.is_empty:
            return
        self.padding = [self.padding[row] for row in rows]
        # One copy for each: `deepcopy` of the list would copy a row that stands twice only once.
        self.layers = [[copy.deepcopy(layers[row]) for row in rows] for layers in self.layers]

    def error_of_crop(self, num_columns: int) -> type[Exception] | None:
        """What `crop(-num_columns)` must raise."""
        if self.is_empty:
            return None
        if num_columns > self.num_seen:
            return ValueError
        has_evicted = any(layer.has_slots for layers in self.layers for layer in layers)
        return NotImplementedError if num_columns and has_evicted else None

    def crop(self, num_columns: int) -> None:
        """Takes columns back."""
        if not self.is_empty:
            self.num_seen -= num_columns
            for layers in self.layers:
                for padding, layer in zip(self.padding, layers, strict=True):
                    layer.take_back(layer.length - max(self.num_seen - padding, 0))

    def compress(self, observed: list[list[Observed]]) -> None:
        """Ends a context: nothing waits any longer."""
        if not self.is_empty:
            for layers, rows in zip(self.layers, observed, strict=True):
                for layer, seen in zip(layers, rows, strict=True):
                    layer.compress(seen)
            self._share()


# Models have no state, and their configs take longer to build than a sequence to run.
build_model = functools.cache(SyntheticModel)


class Run:
    """A sequence of operations on a cache and its reference. Each operation is a method."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.random = np.random.default_rng(setup.seed)
        self.model = build_model(setup.num_layers, setup.kv_heads, setup.group, setup.head_dim, setup.attention)
        self.cache = setup.cache_class(self.model.config, **setup.settings)
        self.reference = Reference(setup, self.cache)

    def draw_chunk(self, num_columns: int) -> Chunk:
        """Random tokens, exact in float32."""
        setup = self.setup
        shape = (setup.num_layers, len(self.reference.rows), setup.kv_heads, num_columns, setup.head_dim)
        key, value = (self.random.standard_normal(shape, dtype=np.float32) for _ in range(2))
        # Queries are wide, so that attention is far from even.
        query = 2 * self.random.standard_normal((*shape[:3], setup.group, *shape[3:]), dtype=np.float32)
        return Chunk(*(array.astype(np.float64) for array in (query, key, value)))

    def observed(self) -> list[list[Observed]]:
        """For each layer, row and KV head the positions that the cache says it holds."""
        return [
            [[set(head) - {-1} for head in row] for row in self.cache.positions(index).tolist()]
            for index in range(self.setup.num_layers)
            if self.cache.compressed_layers[index].is_initialized
        ]

    # What can be done to a cache.

    def update(self, num_columns: int) -> None:
        """One forward pass, whose output is compared."""
        setup, reference = self.setup, self.reference
        num_columns = reference.fitting(num_columns)
        chunk = self.draw_chunk(num_columns)
        is_token = reference.is_token(reference.num_seen + num_columns)
        positions = is_token.long().cumsum(dim=-1)[:, -num_columns:] - 1  # (batch, columns)
        mask = self.model.mask(is_token, num_columns, setup.with_mask)
        outputs = []
        for index in range(setup.num_layers):
            states = (torch.tensor(array[index]).float() for array in (chunk.query, chunk.key, chunk.value))
            query, key, value = (tensor.flatten(1, -3) for tensor in states)
            kwargs = {"position_ids": positions.clamp(min=0)}
            outputs.append(self.model.run_layer(self.cache, index, query, key, value, mask, **kwargs))
        expected = reference.update(chunk, self.observed())
        for index, output in enumerate(outputs):
            assert output.shape == (len(positions), num_columns, setup.kv_heads * setup.group, setup.head_dim)
            for row, wanted in enumerate(expected[index]):
                if wanted is None:
                    continue
                found = output[row, num_columns - wanted.shape[2] :].transpose(0, 1).double().numpy()
                difference = np.abs(found - wanted.reshape(found.shape)).max()
                assert difference < 1e-5, f"attention of layer {index}, row {row} is off by {difference:.1e}"

    def decode(self, num_steps: int) -> None:
        """As many forward passes of one token each."""
        for _ in range(num_steps):
            self.update(1)

    def crop(self, num_tokens: int) -> None:
        """Takes tokens back, or must not."""
        error = self.reference.error_of_crop(num_tokens)
        if error is not None:
            with pytest.raises(error):
                self.cache.crop(-num_tokens)
            return
        self.cache.crop(-num_tokens)
        self.reference.crop(num_tokens)
        if num_tokens and self.cache.policy.window_size != 0:  # the scores have a part of them: see test_recording.py
            self.check()
            self.reset(self.setup.batch_size, self.setup.padding)

    def compress(self) -> None:
        """Ends a context."""
        self.cache.compress()
        self.reference.compress(self.observed())

    def select(self, *chosen: int) -> None:
        """Rows by `batch_select_indices`."""
        rows = [row % len(self.reference.rows) for row in chosen]
        indices = torch.tensor(rows)
        if rows == sorted(set(rows)):
            indices = torch.isin(torch.arange(len(self.reference.rows)), indices)  # a mask says the same
        self.cache.batch_select_indices(indices)
        self.reference.map_rows(rows)

    def reorder(self, *chosen: int) -> None:
        """As many rows as there are, by `reorder_cache`."""
        num_rows = len(self.reference.rows)
        rows = ([row % num_rows for row in chosen] * MAX_ROWS)[:num_rows]
        self.cache.reorder_cache(torch.tensor(rows))
        self.reference.map_rows(rows)

    def repeat(self, times: int) -> None:
        """Each row several times, side by side."""
        times = min(times, MAX_ROWS // len(self.reference.rows))
        self.cache.batch_repeat_interleave(times)
        self.reference.map_rows([row for row in self.reference.rows for _ in range(times)])

    def reset(self, batch_size: int, padding: tuple[int, ...]) -> None:
        """Forgets everything, and begins another batch."""
        self.cache.reset()
        self.reference.reset(batch_size, padding)

    def check(self) -> None:
        """That the cache holds what its reference holds."""
        self.check_counts()
        if not self.reference.is_empty:
            for index in range(self.setup.num_layers):
                self.check_triples(index)

    def check_counts(self) -> None:
        """Tokens seen and held, rows."""
        cache, reference = self.cache, self.reference
        for index in range(len(cache.layers)):
            assert cache.get_seq_length(index) == reference.num_seen
            assert cache.get_mask_sizes(3, index) == (reference.num_seen + 3, 0)
        kept = [max(layer.num_held for layer in layers) for layers in reference.layers]
        assert cache.num_kept_tokens() == kept
        assert cache.batch_size == (-1 if reference.is_empty else len(reference.rows))

    def check_triples(self, layer_idx: int) -> None:
        """That each slot holds the key and the value that arrived for its position, each token once."""
        positions = self.cache.positions(layer_idx)
        assert positions.shape[:2] == (len(self.reference.rows), self.setup.kv_heads)
        layer = self.cache.compressed_layers[layer_idx]
        keys, values = (states[:, :, : layer.state.length].double().numpy() for states in (layer.keys, layer.values))
        for row in self.reference.rows:
            for head, triples in enumerate(self.reference.layers[layer_idx][row].held):
                slots = {token: slot for slot, token in enumerate(positions[row, head].tolist()) if token >= 0}
                assert (positions[row, head] >= 0).sum() == len(slots), "a token is held twice"
                wanted = [triple.position for triple in triples]
                assert sorted(slots) == wanted, f"layer {layer_idx}, row {row}, head {head} holds other tokens"
                if triples:
                    order = [slots[position] for position in wanted]
                    assert np.array_equal(keys[row, head][order], [triple.key for triple in triples])
                    assert np.array_equal(values[row, head][order], [triple.value for triple in triples])


# Random sequences. An operation is the name of a method of `Run`, and its arguments.

Operation = tuple[Any, ...]
PADDING = st.tuples(*[st.sampled_from([0, 0, 0, 1, 2, 5, 12])] * 3)
ROWS = st.lists(st.integers(0, MAX_ROWS - 1), min_size=1, max_size=4)
UPDATES = st.tuples(st.sampled_from(["update", "decode"]), st.one_of(st.integers(1, 6), st.integers(1, 24)))
OTHERS = st.one_of(
    st.tuples(st.just("crop"), st.one_of(st.integers(0, 4), st.integers(0, 30))),
    st.tuples(st.sampled_from(["select", "reorder"]), ROWS).map(lambda drawn: (drawn[0], *drawn[1])),
    st.tuples(st.just("repeat"), st.integers(1, 3)),
    st.tuples(st.just("compress")),
    st.tuples(st.just("reset"), st.integers(1, 3), PADDING),
)
# At least half of the operations bring tokens: nothing else makes a cache evict.
OPERATIONS = st.one_of(st.tuples(UPDATES), st.tuples(UPDATES, OTHERS), st.tuples(OTHERS, UPDATES))

# Arguments of constructors beside the budget.
ARGUMENTS = {
    "num_sink_tokens": st.integers(0, 4),
    "heavy_ratio": st.sampled_from([0.0, 0.29, 0.5, 0.9]),
    "window_size": st.sampled_from([1, 3, 8]),
    "kernel_size": st.sampled_from([1, 3, 5]),
    "beta": st.sampled_from([1.0, 2.5, 20.0]),
    "importance_weight": st.sampled_from([0.1, 0.6, 1.0]),
    "similarity_threshold": st.sampled_from([0.2, 0.5, 1.0]),
    "eviction_interval": st.sampled_from([1, 2, 5, 32]),
    "min_context_length": st.integers(0, 8),
    "distance_weight": st.sampled_from([0.5, 1.0, 1.2, 3.0]),
    "decay_ratio": st.sampled_from([0.1, 0.3, 1.0]),
    "recent_ratio": st.sampled_from([0.0, 0.1, 0.2]),
}


@st.composite
def setups(draw: st.DrawFn, cache_class: type[CompressedCache]) -> Setup:
    """A cache with random settings, for a model of random sizes."""
    sizes = {
        "num_layers": draw(st.integers(1, 3)),
        "kv_heads": draw(st.integers(1, 3)),
        "group": draw(st.integers(1, 3)),
        "head_dim": draw(st.integers(2, 4)) * 2,
    }
    known = parameters_of(cache_class)
    arguments = {name: draw(strategy) for name, strategy in ARGUMENTS.items() if name in known}
    if "preset" in known and draw(st.integers(0, 9)) == 9:
        arguments["preset"] = draw(st.sampled_from(["llama-2-7b", "llama-2-13b", "llama-2-70b"]))
    else:
        numbers = st.integers(arguments.get("num_sink_tokens", 0) + 1, 20)
        shares = st.sampled_from([0.15, 0.29, 0.5, 0.75, 0.9, 0.97])
        arguments["budget"] = draw(st.one_of(numbers, shares, st.just(1.0)))
    return Setup(
        cache_class,
        arguments,
        **sizes,
        batch_size=draw(st.integers(1, 3)),
        padding=draw(PADDING),
        attention=draw(st.sampled_from(["sdpa", "eager", "flash_on_cpu"])),
        with_mask=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def sequences(draw: st.DrawFn, cache_class: type[CompressedCache], longest: int) -> tuple[Setup, list[Operation]]:
    """A cache, and up to twice as many operations as `longest`."""
    operations = draw(st.lists(OPERATIONS, min_size=1, max_size=longest))
    return draw(setups(cache_class)), [operation for some in operations for operation in some]


@torch.no_grad()
def run_sequence(setup: Setup, operations: list[Operation]) -> None:
    """Runs operations on a new cache, and checks it after each."""
    run = Run(setup)
    for name, *arguments in operations:
        getattr(run, name)(*arguments)
        run.check()


# What random sequences come by rarely.
SNAPKV = {"budget": 5, "window_size": 3, "kernel_size": 3, "eviction_interval": 32}
SEQUENCES: dict[str, tuple[Setup, list[Operation]]] = {
    "a fraction of a longer turn is more than is held": (
        Setup(H2OCache, {"budget": 0.75, "heavy_ratio": 0.0}),
        [("update", 1), ("decode", 4), ("update", 2), ("decode", 4)],
    ),
    "rows change places": (
        Setup(H2OCache, {"budget": 6, "heavy_ratio": 0.5}, batch_size=3, padding=(0, 5, 2)),
        [("update", 9), ("select", 2, 0, 0, 1), ("update", 5), ("reset", 2, (0, 3, 0)), ("update", 9), ("repeat", 2)],
    ),
    "tokens are taken back before anything is evicted": (
        Setup(H2OCache, {"budget": 9, "heavy_ratio": 0.5}, batch_size=2, padding=(0, 2, 0)),
        [("update", 6), ("crop", 3), ("decode", 4), ("crop", 1), ("decode", 9)],
    ),
    "a context ends while what was generated waits": (
        Setup(SnapKVCache, SNAPKV, batch_size=2),
        [("update", 3), ("decode", 6), ("compress",), ("decode", 2), ("update", 3), ("decode", 3), ("compress",)]
        + [("decode", 2)],
    ),
    "a prompt grows up to its budget, and its window stays as it was": (
        Setup(PyramidCache, {"budget": 9, "num_sink_tokens": 0, "distance_weight": 0.5, "eviction_interval": 5}),
        [("decode", 20), ("compress",), ("update", 30), ("decode", 20)],
    ),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences(name: str) -> None:
    run_sequence(*SEQUENCES[name])


CLASSES = {case.cache_class: case.tier for case in CACHE_CASES if not case.has_own_reference}


@pytest.mark.parametrize(
    "cache_class, longest",
    [
        pytest.param(cache_class, 6, id=cache_class.__name__, marks=pytest.mark.slow if tier == "slow" else ())
        for cache_class, tier in CLASSES.items()
    ]
    # Caches of the slow tier differ from that of the quick one in their scores alone.
    + [
        pytest.param(cache_class, 12, id=f"{cache_class.__name__}-long", marks=pytest.mark.slow)
        for cache_class, tier in CLASSES.items()
        if tier == "quick"
    ],
)
def test_random_sequences(cache_class: type[CompressedCache], longest: int) -> None:
    @given(sequences(cache_class, longest))
    def check(sequence: tuple[Setup, list[Operation]]) -> None:
        run_sequence(*sequence)

    check()


EVICTING = [case for case in CACHE_CASES if case.evicts]


# Keys tell positions, unless some are means of others.
@parametrize_cases(case for case in EVICTING if not case.reads_again and not case.compacts)
@torch.no_grad()
def test_update_returns_all_that_a_query_sees(case: CacheCase) -> None:
    """Of each head `(batch, kv_heads, keys, head_dim)` the held tokens and the new one, whose keys tell positions."""
    # A step of heads that hold different numbers returns the latest tokens alone: the others stay packed.
    for num_new in (3,) if case.heads_compete else (1, 3):
        model, num_seen = build_model(1, 2, 2, 4), 0
        cache = case.cache_class(model.config, **case.tight)
        for number in (40, 1, 1, 1, 1, num_new):
            shape, query = (2, 2, number, 4), torch.randn(2, 4, number, 4)
            key = torch.arange(num_seen, num_seen + number)[:, None].expand(shape).float()
            num_seen += number
            if num_seen < 44 + num_new:
                model.run_layer(cache, 0, query, key, key + 100 * torch.randn(shape), None)
        held = cache.positions(0)
        keys, values = cache.update(key, key + 0.5, 0)
        assert keys.shape == values.shape and keys.shape[:2] == (2, 2) and keys.shape[3] == 4
        layer = cache.layers[0]
        positions = layer.held_positions()
        if num_new > 1:  # behind the others, which have been brought into order
            positions = torch.nn.functional.pad(layer.arrival.slot_positions, (0, num_new))
        is_token = (positions >= 0).expand(keys.shape[:3])
        for row, head in np.ndindex(2, 2):
            wanted = sorted([*held[row, head][held[row, head] >= 0].tolist(), *range(44, num_seen)])
            assert sorted(keys[row, head, :, 0][is_token[row, head]].int().tolist()) == wanted
            assert (values[row, head] == keys[row, head] + 0.5).all(dim=-1).sum() == num_new


@parametrize_cases(EVICTING)
@pytest.mark.parametrize("preset", [None, "llama-2-7b"])
@torch.no_grad()
def test_no_cache_grows_with_the_answer(case: CacheCase, preset: str | None) -> None:
    """No layer holds more than its budget and the tokens that wait, and its slots are no more than these."""
    if preset is not None and case.cache_class is not PyramidCache:
        return
    model = tiny_model("llama")
    settings = case.tight if preset is None else {"preset": preset, "min_context_length": 4, "eviction_interval": 3}
    cache = case.make(model, settings)
    interval = settings.get("eviction_interval", 1)
    model(random_tokens(1, 50), past_key_values=cache, logits_to_keep=1)
    kept, counts = cache.num_kept_tokens(), []
    for token in random_tokens(70, 1, 1):
        model(token, past_key_values=cache)
        counts.append(cache.num_kept_tokens())
    for layer, budget, held in zip(cache.layers, kept, zip(*counts, strict=True), strict=True):
        most = 2 * budget if case.heads_compete else budget
        assert kept[-1] < 50 and max(held) < most + interval and layer.keys.shape[2] <= most + interval
