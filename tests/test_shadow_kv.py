"""ShadowKVCache: against the full cache, a reference in loops, the truncated SVD, and what it must refuse."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ROPE_VARIANTS, random_tokens, tiny_model
from synthetic import SyntheticModel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache

from pyramid_cache import ShadowKVCache
from pyramid_cache.caches.shadow_kv import ShadowKVLayer
from pyramid_cache.engine.host import gather_through_host
from pyramid_cache.engine.landmarks import landmarks_of, probe_of
from pyramid_cache.engine.low_rank import gram_matrix
from pyramid_cache.ops.shadow import gather_values


SMALL = {"chunk_size": 4, "num_outlier_chunks": 2, "num_local_tokens": 4, "offload_interval": 6}


@pytest.fixture
def _always_in_shadow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the slots would hold."""
    monkeypatch.setattr(ShadowKVLayer, "num_tokens_to_keep", lambda layer, row_length: 20)


# Everything within reach.


@torch.no_grad()
def conversation(model: torch.nn.Module, cache: object, paddings: list[int], lengths: list[int]) -> torch.Tensor:
    """The logits of turns of tokens, each but every second read at once, of rows that begin with so much padding."""
    tokens = random_tokens(len(paddings), sum(lengths), seed=1)
    mask = (torch.arange(tokens.shape[1]) >= torch.tensor(paddings)[:, None]).long()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits, start = [], 0
    for index, length in enumerate(lengths):
        for width in [length] if index % 2 == 0 else [1] * length:
            stop = start + width
            output = model(
                tokens[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
            )
            logits.append(output.logits)
            start = stop
    return torch.cat(logits, dim=1) * mask[..., None]


@pytest.mark.usefixtures("_always_in_shadow")
@pytest.mark.parametrize("paddings", [[0], [0, 5], [0, 60, 31]], ids=["one", "padded", "short"])
@pytest.mark.parametrize("name", ["llama", "glm4", "phi3", "gpt2"])
def test_full_rank_and_a_whole_budget_are_the_full_cache(name: str, paddings: list[int]) -> None:
    """Prompts, steps and a second turn, models with full, partial, interleaved and no RoPE."""
    model, lengths = tiny_model(name), [70, 60, 9, 30]
    cache = ShadowKVCache(model.config, budget=400, rank=10_000, **SMALL)
    found = conversation(model, cache, paddings, lengths)
    assert all(min(layer.row_shadow) > 0 for layer in cache.compressed_layers)
    expected = conversation(model, DynamicCache(config=model.config), paddings, lengths)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_what_the_slots_would_hold_stays_as_it_is() -> None:
    model = tiny_model("llama")
    cache = ShadowKVCache(model.config, budget=40, **SMALL)
    found = conversation(model, cache, [0, 5], [30, 20])
    assert torch.equal(found, conversation(model, DynamicCache(config=model.config), [0, 5], [30, 20]))
    assert all(layer.positions is None for layer in cache.compressed_layers)


# A reference in loops.


@dataclass
class ReferenceHead:
    """What one head of one row knows: all tokens, the basis of its layer, and which chunks it holds as they were."""

    keys: list[list[float]] = field(default_factory=list)
    values: list[list[float]] = field(default_factory=list)
    rebuilt: list[list[float]] = field(default_factory=list)  # of the shadow
    outliers: list[tuple[float, int]] = field(default_factory=list)  # lowest cosine, chunk


class ReferenceShadow:
    """
    One layer of ShadowKV on models without RoPE, in loops.

    Args:
        kv_heads: KV heads.
        num_sparse: Chunks that a step attends to.
        rank: Dimensions of the basis.
        small: Settings of `ShadowKVCache`.
    """

    def __init__(self, kv_heads: int, num_sparse: int, rank: int, **small: int) -> None:
        self.num_sparse, self.rank = num_sparse, rank
        self.chunk_size, self.num_outliers = small["chunk_size"], small["num_outlier_chunks"]
        self.num_local, self.num_bands = small["num_local_tokens"], small["num_spread_bands"]
        self.heads = [ReferenceHead() for _ in range(kv_heads)]
        self.num_shadow = 0
        self.axes: torch.Tensor | None = None  # (rank, kv_heads * head_dim)

    @property
    def num_tail(self) -> int:
        return len(self.heads[0].keys) - self.num_shadow

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """New tokens `(kv_heads, tokens, head_dim)`."""
        for head, keys, values in zip(self.heads, key.tolist(), value.tolist(), strict=True):
            head.keys += keys
            head.values += values

    def move(self) -> None:
        """Full chunks but the local tokens go to the shadow; the first ones make the basis."""
        count = max((self.num_tail - self.num_local) // self.chunk_size, 0) * self.chunk_size
        if not count:
            return
        start, stop = self.num_shadow, self.num_shadow + count
        joint = torch.tensor([sum((head.keys[token] for head in self.heads), []) for token in range(start, stop)])
        if self.axes is None:
            self.axes = torch.linalg.svd(joint.double(), full_matrices=False).Vh[: self.rank]
        projected = (joint.double() @ self.axes.T @ self.axes).unflatten(1, (len(self.heads), -1))
        for index, head in enumerate(self.heads):
            head.rebuilt += projected[:, index].tolist()
            for chunk in range(start // self.chunk_size, stop // self.chunk_size):
                mean = self.mean(head, chunk)
                keys = head.keys[chunk * self.chunk_size : (chunk + 1) * self.chunk_size]
                head.outliers.append((min(cosine(key, mean) for key in keys), chunk))
            head.outliers = sorted(head.outliers)[: self.num_outliers]
        self.num_shadow = stop

    def mean(self, head: ReferenceHead, chunk: int) -> list[float]:
        keys = head.keys[chunk * self.chunk_size : (chunk + 1) * self.chunk_size]
        return [sum(column) / self.chunk_size for column in zip(*keys, strict=True)]

    def logit(self, head: ReferenceHead, chunk: int, query: list[float]) -> float:
        """Of the mean, and what each band of dimensions may add to it."""
        keys, mean = head.keys[chunk * self.chunk_size : (chunk + 1) * self.chunk_size], self.mean(head, chunk)
        deviations = [
            math.sqrt(sum((key[index] - mean[index]) ** 2 for key in keys) / self.chunk_size)
            for index in range(len(mean))
        ]
        logit, half = dot(query, mean), len(mean) // 2
        width = math.ceil(half / max(self.num_bands, 1))
        for band in range(self.num_bands):
            pairs = range(band * width, min((band + 1) * width, half))
            members = [*pairs, *(half + pair for pair in pairs)]
            spread = sum(deviations[index] for index in members) / (2 * width)
            logit += sum(abs(query[index]) for index in members) * spread
        return logit

    def attend(self, query: torch.Tensor, scaling: float) -> tuple[torch.Tensor, list[set[int]]]:
        """The output `(heads, head_dim)` of one query `(heads, head_dim)`, and the tokens that each KV head attended to."""
        group = query.shape[0] // len(self.heads)
        outputs, attended = [], []
        for index, head in enumerate(self.heads):
            queries = query[index * group : (index + 1) * group].tolist()
            outliers = {chunk for _, chunk in head.outliers}
            others = [chunk for chunk in range(self.num_shadow // self.chunk_size) if chunk not in outliers]
            best = dict.fromkeys(others, 0.0)
            for one in queries:
                shares = softmax([scaling * self.logit(head, chunk, one) for chunk in others])
                for chunk, share in zip(others, shares, strict=True):
                    best[chunk] = max(best[chunk], share)
            chosen = sorted(others, key=lambda chunk: -best[chunk])[: self.num_sparse]
            keys = {}
            for chunk in (*outliers, *chosen):
                source = head.keys if chunk in outliers else head.rebuilt
                for token in range(chunk * self.chunk_size, (chunk + 1) * self.chunk_size):
                    keys[token] = source[token]
            keys |= {token: head.keys[token] for token in range(self.num_shadow, len(head.keys))}
            for one in queries:
                shares = softmax([scaling * dot(one, key) for key in keys.values()])
                rows = [head.values[token] for token in keys]
                outputs.append([dot(shares, column) for column in zip(*rows, strict=True)])
            attended.append(set(keys))
        return torch.tensor(outputs), attended


def dot(left: list[float], right: list[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def cosine(left: list[float], right: list[float]) -> float:
    return dot(left, right) / math.sqrt(dot(left, left) * dot(right, right))


def softmax(logits: list[float]) -> list[float]:
    largest = max(logits, default=0.0)
    parts = [math.exp(logit - largest) for logit in logits]
    return [part / sum(parts) for part in parts]


def test_landmarks_by_hand() -> None:
    """Of five dimensions the first and the fourth are one pair, the second and the fifth another; the third is alone."""
    chunk = torch.tensor([[[[[1.0, 0, 5, 2, 0], [3.0, 0, 5, 2, 8]]]]])
    mean = [2.0, 0, 5, 2, 4]  # and deviations of 1, 0, 0, 0 and 4
    query = torch.tensor([1.0, -2, 3, -4, 5])
    for num_bands, width, spreads, sums in (
        (0, 1, [], []),
        (1, 6, [5], [15]),
        (2, 4, [5, 0], [12, 3]),
        (3, 2, [1, 4, 0], [5, 7, 3]),
    ):
        expected = torch.tensor([*mean, *(spread / width**0.5 for spread in spreads)])
        torch.testing.assert_close(landmarks_of(chunk, num_bands).flatten(), expected)
        expected = torch.tensor([*query.tolist(), *(number / width**0.5 for number in sums)])
        torch.testing.assert_close(probe_of(query, num_bands), expected)


def test_there_is_a_band_for_two_dimensions_at_least() -> None:
    model = SyntheticModel(1, 2, 1, 6)
    cache = ShadowKVCache(model.config, budget=8, rank=4, num_spread_bands=100, **SMALL)
    key = torch.randn(1, 2, 60, 6)
    model.run_layer(cache, 0, key, key, key, None)
    (layer,) = cache.compressed_layers
    assert layer.landmarks.shape[-1] == 6 + 3


def test_spreads_stay_within_float16() -> None:
    """Where the sum over a band of dimensions would not, of queries or of keys."""
    query = torch.full((1, 1, 1, 256), 2100.0, dtype=torch.float16)
    keys = torch.stack([torch.zeros(256), torch.full((256,), 4000.0)])[None, None, None]
    probe, landmark = probe_of(query, 4), landmarks_of(keys, 4).half()
    assert probe.isfinite().all() and landmark.isfinite().all()
    # As high above the mean as the higher key is.
    product = (probe.flatten().double() * landmark.flatten().double()).sum().item()
    assert product == pytest.approx(256 * 2100 * 4000, rel=1e-3)


@pytest.mark.parametrize("num_steps", [60, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kv_heads, group, rank, num_bands", [(2, 2, 7, 2), (1, 4, 3, 0), (3, 1, 18, 3)])
@torch.no_grad()
def test_steps_are_those_of_the_reference(
    kv_heads: int, group: int, rank: int, num_bands: int, num_steps: int
) -> None:
    """What is attended to and what comes of it, of rows that begin and move at different times."""
    paddings, num_prompt, head_dim = [0, 7], 90, 6
    model = SyntheticModel(1, kv_heads, group, head_dim)
    settings = {**SMALL, "num_spread_bands": num_bands}
    cache = ShadowKVCache(model.config, budget=12, rank=rank, **settings)
    (layer,) = cache.compressed_layers
    generator = torch.Generator().manual_seed(kv_heads)
    references = [ReferenceShadow(kv_heads, 3, rank, **settings) for _ in paddings]
    is_token = torch.arange(num_prompt) >= torch.tensor(paddings)[:, None]
    is_hit, is_miss, last_query = False, False, None
    for step in range(num_steps + 1):
        width = num_prompt if step == 0 else 1
        query = torch.randn(2, kv_heads * group, width, head_dim, generator=generator)
        # Neighbouring queries and keys are alike, as in text: chunks stay for some steps.
        query = query if last_query is None else 0.3 * query + 0.7 * last_query
        key, value = (torch.randn(2, kv_heads, width, head_dim, generator=generator) for _ in range(2))
        key[:, :, 1:] += key[:, :, :-1].clone()
        last_query = query[:, :, -1:]
        if step:
            is_token = torch.nn.functional.pad(is_token, (0, 1), value=True)
        held = None if layer.held_chunks is None else layer.held_chunks.clone()
        output = model.run_layer(cache, 0, query, key, value, model.mask(is_token, width, False))
        for row, (padding, reference) in enumerate(zip(paddings, references, strict=True)):
            first = padding if step == 0 else 0
            reference.append(key[row, :, first:], value[row, :, first:])
        if step == 0:
            for reference in references:
                reference.move()
            continue
        for row, reference in enumerate(references):
            expected, attended = reference.attend(query[row, :, 0], model.scaling)
            torch.testing.assert_close(output[row, 0], expected, atol=1e-4, rtol=0)
            if reference.num_tail < 4 + 6 + 4:  # else the tail has moved since
                found = [set(head.tolist()) - {-1} for head in cache.positions(0)[row]]
                assert found == attended
            else:
                reference.move()
        assert cache.num_kept_tokens() == [
            max(len(set(head.tolist()) - {-1}) for row in cache.positions(0) for head in row)
        ]
        is_hit |= bool((held == layer.held_chunks).any())
        is_miss |= bool((held != layer.held_chunks).any())
        assert layer.row_shadow == [reference.num_shadow for reference in references]
    assert is_hit and is_miss


# Rows of a batch.


@pytest.mark.parametrize(
    "settings",
    [{"budget": 0.2, "rank": 7}, {"budget": 8, "rank": 0.8}, {"budget": 8, "quantize": "int8"}],
    ids=["share", "energy", "int8"],
)
@torch.no_grad()
def test_rows_do_what_they_do_alone(settings: dict[str, Any]) -> None:
    """Those that are exact for long, begin their shadow among steps, or have less to read in a turn, too."""
    model = tiny_model("llama")
    paddings, lengths = [0, 20, 50, 66], [70, 30, 9, 25]
    tokens = random_tokens(4, sum(lengths), seed=3)
    is_token = torch.arange(sum(lengths)) >= torch.tensor(paddings)[:, None]
    is_token[1, 100:104] = is_token[2, 100] = False  # of the second turn
    pieces = [(0, 70), *((start, start + 1) for start in range(70, 100)), (100, 109)]
    pieces += [(start, start + 1) for start in range(109, 134)]

    def read(row_tokens: torch.Tensor, row_mask: torch.Tensor, cache: ShadowKVCache) -> Iterator[torch.Tensor]:
        positions = (row_mask.cumsum(dim=1) - 1).clamp(min=0)
        for start, stop in pieces:
            if row_mask[:, start:stop].any():
                output = model(
                    row_tokens[:, start:stop],
                    attention_mask=row_mask[:, :stop].long(),
                    position_ids=positions[:, start:stop],
                    past_key_values=cache,
                )
                yield start, output.logits[:, -1]

    together = ShadowKVCache(model.config, **settings, **SMALL)
    logits = dict(read(tokens, is_token, together))
    assert len({*together.compressed_layers[0].row_shadow}) > 2
    for row in range(4):
        alone = ShadowKVCache(model.config, **settings, **SMALL)
        for start, expected in read(tokens[row : row + 1], is_token[row : row + 1], alone):
            if "quantize" not in settings:  # numbers near the middle of two steps may be rounded to either
                torch.testing.assert_close(logits[start][row], expected[0], atol=1e-3, rtol=0)
        if "quantize" in settings:
            found, expected = (
                together.compressed_layers[0].landmark_scales[row],
                alone.compressed_layers[0].landmark_scales[0],
            )
            torch.testing.assert_close(found, expected, atol=0, rtol=1e-4)
            continue
        for layer in range(3):
            found = [{*head} - {-1} for head in together.positions(layer)[row].tolist()]
            assert found == [{*head} - {-1} for head in alone.positions(layer)[0].tolist()]


# Keys of low rank.

# By how they turn keys: every kind of frequencies, part of a head, in other pairs, and not at all.
LOW_RANK_MODELS = ["llama", *(f"llama_{variant}" for variant in ROPE_VARIANTS), "phi3", "glm4", "cohere", "gpt2"]


@pytest.mark.parametrize("name", LOW_RANK_MODELS)
@pytest.mark.usefixtures("_always_in_shadow")
@torch.no_grad()
def test_rebuilt_keys_are_the_truncated_svd(name: str) -> None:
    """Of the keys before they are turned, turned again: all that depends on how a model turns them cancels out."""
    model, tokens, rank = tiny_model(name), random_tokens(1, 100, seed=2), 9
    cache, full = ShadowKVCache(model.config, budget=8, rank=rank, **SMALL), DynamicCache(config=model.config)
    for each in (cache, full):
        model(tokens, past_key_values=each)
    for layer, full_layer in zip(cache.compressed_layers, full.layers, strict=True):
        (num_shadow,) = layer.row_shadow
        exact = full_layer.keys[:, :, :num_shadow].double()
        positions = torch.arange(num_shadow)[None, None]
        rotary = layer.rotary
        turns = 0 if rotary is None else rotary.model_angles(positions, 100)
        plain = exact if rotary is None else rotary.rotate(exact, -turns)
        joint = plain.transpose(1, 2).flatten(2)[0]
        left, singular, right = torch.linalg.svd(joint, full_matrices=False)
        truncated = (left[:, :rank] * singular[:rank]) @ right[:rank]
        expected = truncated[None].unflatten(2, (exact.shape[1], -1)).transpose(1, 2)
        expected = expected if rotary is None else rotary.rotate(expected, turns)
        layer.outlier_chunks.fill_(-1)  # which are exact
        found = layer._sorted_slots()["keys"][:, :, :num_shadow].double()
        assert ((found - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.usefixtures("_always_in_shadow")
@torch.no_grad()
def test_a_rank_by_energy_differs_between_layers() -> None:
    model, tokens = tiny_model("llama"), random_tokens(1, 100, seed=2)
    cache = ShadowKVCache(model.config, budget=8, rank=0.9, **SMALL)
    model(tokens, past_key_values=cache)
    full = DynamicCache(config=model.config)
    model(tokens, past_key_values=full)
    for layer, full_layer in zip(cache.compressed_layers, full.layers, strict=True):
        (num_shadow,) = layer.row_shadow
        keys = full_layer.keys[:, :, :num_shadow]
        plain = layer.rotary.rotate(keys, -layer.rotary.model_angles(torch.arange(num_shadow)[None, None], 100))
        squares = torch.linalg.svdvals(plain.transpose(1, 2).flatten(2)[0].double()).square()
        held = squares.cumsum(dim=0) / squares.sum()
        rank = layer.factors.shape[-1]
        assert held[rank - 1] >= 0.9 > held[rank - 2]


@pytest.mark.usefixtures("_always_in_shadow")
@torch.no_grad()
def test_a_prompt_in_chunks_has_the_basis_of_all_of_it() -> None:
    """At full rank nothing is lost on the way: the axes are those of one reading."""
    model, tokens = tiny_model("llama"), random_tokens(1, 100, seed=2)
    layers = []
    for widths in ([100], [40, 25, 35]):
        cache, start = ShadowKVCache(model.config, budget=8, rank=10_000, **SMALL), 0
        for width in widths:
            model(tokens[:, start : start + width], past_key_values=cache)
            start += width
        layers.append(cache.compressed_layers)
    for whole, pieces in zip(*layers, strict=True):
        assert torch.equal(whole.outlier_chunks, pieces.outlier_chunks)
        torch.testing.assert_close(whole.landmarks, pieces.landmarks, atol=1e-4, rtol=0)
        for layer in (whole, pieces):
            layer.outlier_chunks.fill_(-1)
        keys = [layer._sorted_slots()["keys"] for layer in (whole, pieces)]
        torch.testing.assert_close(*keys, atol=1e-3, rtol=0)
        grams = [gram_matrix(layer.basis.transpose(1, 2).flatten(2)) for layer in (whole, pieces)]
        torch.testing.assert_close(*grams, rtol=1e-3, atol=1e-2)


# One byte a number.


@pytest.mark.parametrize("quantize, tolerance", [("int8", 0.02), ("fp8", 0.05)])
@pytest.mark.usefixtures("_always_in_shadow")
@torch.no_grad()
def test_quantised_keys_are_near(quantize: str, tolerance: float) -> None:
    """Of a prompt, and of generated tokens whose factors exceed all that the prompt had."""
    model = tiny_model("llama")
    found, expected = (
        ShadowKVCache(model.config, budget=8, rank=10_000, quantize=name, **SMALL) for name in (quantize, None)
    )
    for cache in (found, expected):
        conversation(model, cache, [0, 5], [60])
    generator = torch.Generator().manual_seed(0)
    for layer, other in zip(found.compressed_layers, expected.compressed_layers, strict=True):
        assert layer.factors.dtype.itemsize == layer.landmarks.dtype.itemsize == 1
        kv_heads, head_dim = layer._key_shape
        key, value = (3 * torch.randn(2, kv_heads, 24, head_dim, generator=generator) for _ in range(2))
        for each in (layer, other):
            each.row_lengths = [length + 24 for length in each.row_lengths]
            positions = torch.tensor(each.row_lengths)[:, None, None] - 24 + torch.arange(24)
            outside = (
                torch.cat(pair, dim=2) for pair in zip(each._outside(), (key, value, positions.int()), strict=True)
            )
            each._arrange(*outside, [each.num_movable(24)] * 2, [False] * 2)
        keys = [each._sorted_slots()["keys"] for each in (layer, other)]
        assert ((keys[0] - keys[1]).norm() / keys[1].norm()).item() < tolerance
        landmarks = layer.landmarks.float() * layer.landmark_scales
        assert ((landmarks - other.landmarks).norm() / other.landmarks.norm()).item() < tolerance


# Where values are.


@pytest.mark.usefixtures("_always_in_shadow")
def test_values_in_a_file_are_the_same(tmp_path: Path) -> None:
    model = tiny_model("llama")
    settings = {"budget": 16, "rank": 12, **SMALL}
    in_file = ShadowKVCache(model.config, host=f"disk:{tmp_path}", **settings)
    in_memory = ShadowKVCache(model.config, **settings)
    found, expected = (conversation(model, cache, [0, 5], [70, 30, 9, 5]) for cache in (in_file, in_memory))
    assert torch.equal(found, expected)
    assert in_file.memory()["host"] == in_memory.memory()["host"]
    assert not list(tmp_path.iterdir())  # files without a name


def test_the_host_reads_for_a_device_what_it_has_no_access_to() -> None:
    """As the op does where it has."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 3, 40, 5, generator=generator)
    incoming = torch.tensor([[[3, -1, 9], [-1, -1, -1], [0, 1, 2]], [[5, 4, -1], [7, -1, 8], [-1, 6, -1]]])
    buffers = [torch.full((2, 3, 12, 5), 7.0) for _ in range(2)]
    gather_values(buffers[0], values, incoming, chunk_size=4)
    gather_through_host(buffers[1], values, incoming, chunk_size=4)
    assert torch.equal(*buffers)


@pytest.mark.usefixtures("_always_in_shadow")
@torch.no_grad()
def test_copies_are_of_the_same_kind_and_go_their_own_way(tmp_path: Path) -> None:
    model = tiny_model("llama")
    cache = ShadowKVCache(model.config, budget=8, rank=9, host=f"disk:{tmp_path}", **SMALL)
    conversation(model, cache, [0, 5], [70, 20])
    twin, before = copy.deepcopy(cache), copy.deepcopy(cache)
    for layer, other in zip(cache.compressed_layers, twin.compressed_layers, strict=True):
        assert other.host_values.untyped_storage().filename is not None
        assert torch.equal(layer.host_values, other.host_values)
    step, mask = random_tokens(2, 1, seed=9), torch.arange(91) >= torch.tensor([[0], [5]])
    found = [model(step, attention_mask=mask.long(), past_key_values=each).logits for each in (twin, before)]
    assert torch.equal(*found)
    assert cache.get_seq_length() == 90 and twin.get_seq_length() == 91


@pytest.mark.usefixtures("_always_in_shadow")
def test_values_beyond_the_host_budget_are_refused_with_what_they_take() -> None:
    model, tokens = tiny_model("llama"), random_tokens(2, 76, seed=1)
    num_shadow = (76 - 4) // 4 * 4
    layer = DynamicCache(config=model.config)
    model(tokens, past_key_values=layer)
    needed = layer.layers[0].values[:, :, :num_shadow].nbytes * len(layer.layers)
    cache = ShadowKVCache(model.config, budget=8, host_budget=needed - 1, **SMALL)
    with pytest.raises(ValueError, match=f"2 rows of 72 tokens take {needed:,} bytes on the host"), torch.no_grad():
        model(tokens, past_key_values=cache)
    cache = ShadowKVCache(model.config, budget=8, host_budget=needed, **SMALL)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    assert cache.memory()["host"]["values"] == needed
    assert f"{cache.nbytes:,} bytes held, {needed:,} of them on the host" in cache.summary()


@pytest.mark.usefixtures("_always_in_shadow")
def test_saved_values_can_go_elsewhere(tmp_path: Path) -> None:
    """Where the folder of their files is gone, say."""
    model, folder, file = tiny_model("llama"), tmp_path / "values", tmp_path / "cache.safetensors"
    folder.mkdir()
    cache = ShadowKVCache(model.config, budget=8, rank=9, host=f"disk:{folder}", host_budget="1MiB", **SMALL)
    conversation(model, cache, [0, 5], [70, 20])
    cache.save(file)
    folder.rmdir()
    with pytest.raises(ValueError, match="a folder that exists"):
        ShadowKVCache.load(file, model)
    loaded = [ShadowKVCache.load(file, model, host=host) for host in ("memory", f"disk:{tmp_path}")]
    step, mask = random_tokens(2, 1, seed=9), torch.arange(91) >= torch.tensor([[0], [5]])
    with torch.no_grad():
        logits = [model(step, attention_mask=mask.long(), past_key_values=each).logits for each in (cache, *loaded)]
    for each, found in zip(loaded, logits[1:], strict=True):
        assert torch.equal(found, logits[0])
        assert each.settings["host_budget"] is None
    with pytest.raises(ValueError, match="more than `host_budget=8`"):
        ShadowKVCache.load(file, model, host="memory", host_budget=8)


# What `generate` does with a cache.


@pytest.mark.usefixtures("_always_in_shadow")
@pytest.mark.parametrize(
    "arguments",
    [{}, {"num_beams": 3}, {"prefill_chunk_size": 16}, {"prompt_lookup_num_tokens": 3}],
    ids=["greedy", "beams", "chunks", "lookup"],
)
def test_generate_is_that_of_the_full_cache(arguments: dict[str, int]) -> None:
    model = tiny_model("llama")
    tokens = random_tokens(1 if "prompt_lookup_num_tokens" in arguments else 2, 60, seed=5)
    outputs = [
        model.generate(
            tokens, past_key_values=cache, max_new_tokens=40, eos_token_id=None, do_sample=False, **arguments
        )
        for cache in (
            DynamicCache(config=model.config),
            ShadowKVCache(model.config, budget=400, rank=10_000, **SMALL),
        )
    ]
    assert torch.equal(*outputs)


@pytest.mark.usefixtures("_always_in_shadow")
@pytest.mark.parametrize("num_back", [1, 3, 20, 50, 66])
@torch.no_grad()
def test_tokens_are_taken_back_out_of_the_shadow(num_back: int) -> None:
    model, tokens = tiny_model("llama"), random_tokens(2, 100, seed=5)
    cache, full = (
        ShadowKVCache(model.config, budget=400, rank=10_000, **SMALL),
        DynamicCache(config=model.config),
    )
    model(tokens[:, :60], past_key_values=cache)
    for column in range(60, 75):
        model(tokens[:, column : column + 1], past_key_values=cache)
    cache.crop(-num_back)
    model(tokens[:, : 75 - num_back], past_key_values=full)
    for column in range(80, 100):
        step = tokens[:, column : column + 1]
        found, expected = (model(step, past_key_values=each).logits for each in (cache, full))
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


@torch.no_grad()
def test_no_step_sees_what_was_taken_back() -> None:
    """Rows of which chunks that were outliers go, rows that are exact again, and rows of which only the tail gets shorter."""
    model, tokens = tiny_model("llama"), random_tokens(1, 200, seed=1)
    for num_back, is_exact in ((60, False), (110, True), (3, False)):
        cache = ShadowKVCache(model.config, budget=16, rank=10_000, **{**SMALL, "num_outlier_chunks": 5})
        model(tokens[:, :150], past_key_values=cache)
        cache.crop(-num_back)
        assert (cache.compressed_layers[0].row_shadow == [0]) == is_exact
        for layer in cache.compressed_layers:
            is_free = layer.positions[..., None] < 0
            layer.keys.masked_fill_(is_free, 1e4)
            layer.values.masked_fill_(is_free, 1e4)
            assert layer.held_positions().max() == 149 - num_back
        logits = model(tokens[:, 150:151], past_key_values=cache).logits
        assert logits.abs().max() < 100
        assert all((layer.held_positions() >= 0).sum() == 2 * layer.row_held[0] for layer in cache.compressed_layers)


@torch.no_grad()
def test_padding_of_a_later_turn_is_not_taken_back_as_tokens() -> None:
    model, mask = tiny_model("llama"), torch.ones(2, 90, dtype=torch.bool)
    mask[0, 80:87] = False
    cache = ShadowKVCache(model.config, budget=8, **SMALL)
    tokens, positions = random_tokens(2, 90, seed=1), (mask.cumsum(dim=1) - 1).clamp(min=0)
    for part in (slice(0, 80), slice(80, 90)):
        inputs = {"attention_mask": mask[:, : part.stop].long(), "position_ids": positions[:, part]}
        model(tokens[:, part], **inputs, past_key_values=cache)
    with pytest.raises(NotImplementedError, match="padding in a later turn.*Take back at most 3"):
        cache.crop(-4)
    cache.crop(-3)
    assert cache.compressed_layers[0].row_lengths == [80, 87]


@torch.no_grad()
def test_what_is_taken_back_before_there_is_a_shadow_counts_no_more(tmp_path: Path) -> None:
    model, tokens = tiny_model("llama"), random_tokens(1, 80, seed=1)
    cache = ShadowKVCache(model.config, budget=8, rank=9, **SMALL)
    model(tokens[:, :20], past_key_values=cache)
    cache.crop(-10)
    model(tokens[:, 10:70], past_key_values=cache)
    assert [layer.num_croppable for layer in cache.compressed_layers] == [70] * 3
    cache.save(tmp_path / "cache.safetensors")
    loaded = ShadowKVCache.load(tmp_path / "cache.safetensors", model)
    logits = [model(tokens[:, 70:71], past_key_values=each).logits for each in (cache, loaded)]
    assert torch.equal(*logits)


@torch.no_grad()
def test_a_row_that_is_left_goes_on_with_a_share_of_its_own() -> None:
    model, tokens = tiny_model("llama"), random_tokens(2, 330, seed=1)
    mask = torch.arange(330) >= torch.tensor([[0], [180]])
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    caches = [ShadowKVCache(model.config, budget=0.3, rank=10_000, **SMALL) for _ in range(2)]
    inputs = {"attention_mask": mask[:, :300].long(), "position_ids": positions[:, :300]}
    model(tokens[:, :300], **inputs, past_key_values=caches[0])
    model(tokens[1:, 180:300], past_key_values=caches[1])
    caches[0].batch_select_indices(torch.tensor([1]))
    for column in range(300, 330):
        inputs = {"attention_mask": mask[1:, : column + 1].long(), "position_ids": positions[1:, column : column + 1]}
        found = model(tokens[1:, column : column + 1], **inputs, past_key_values=caches[0]).logits
        expected = model(tokens[1:, column : column + 1], past_key_values=caches[1]).logits
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.usefixtures("_always_in_shadow")
@pytest.mark.parametrize("num_tokens", [2, 5, 9])
@torch.no_grad()
def test_a_loaded_cache_takes_turns(num_tokens: int, tmp_path: Path) -> None:
    model, tokens = tiny_model("llama"), random_tokens(1, 120, seed=1)
    cache = ShadowKVCache(model.config, budget=16, rank=12, **{**SMALL, "num_local_tokens": 0})
    model(tokens[:, :100], past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = ShadowKVCache.load(tmp_path / "cache.safetensors", model)
    for part in (slice(100, 100 + num_tokens), slice(100 + num_tokens, 101 + num_tokens)):
        found, expected = (model(tokens[:, part], past_key_values=each).logits for each in (loaded, cache))
        assert torch.equal(found, expected)


@pytest.mark.usefixtures("_always_in_shadow")
@pytest.mark.parametrize("quantize", [None, "int8", "fp8"])
@torch.no_grad()
def test_a_file_goes_on_as_the_cache_would(quantize: str | None, tmp_path: Path) -> None:
    model = tiny_model("llama")
    cache = ShadowKVCache(model.config, budget=16, rank=12, quantize=quantize, **SMALL)
    conversation(model, cache, [0, 5], [70, 33])
    cache.save(tmp_path / "cache.safetensors")
    loaded = ShadowKVCache.load(tmp_path / "cache.safetensors", model)
    assert loaded.memory()["host"] == {"keys": 0, "values": loaded.memory()["host"]["values"], "bookkeeping": 0}
    tokens, mask = random_tokens(2, 40, seed=8), torch.ones(2, 143, dtype=torch.long)
    mask[1, :5] = 0
    for column in range(40):
        step = {"input_ids": tokens[:, column : column + 1], "attention_mask": mask[:, : 104 + column]}
        found, expected = (model(**step, past_key_values=each).logits for each in (loaded, cache))
        assert torch.equal(found, expected)


@pytest.mark.usefixtures("_always_in_shadow")
def test_scales_and_landmarks_of_a_file_are_checked() -> None:
    model = tiny_model("llama")
    caches = {
        quantize: ShadowKVCache(model.config, budget=16, quantize=quantize, **SMALL) for quantize in ("int8", None)
    }
    with torch.no_grad():
        for cache in caches.values():
            model(random_tokens(2, 60), past_key_values=cache)
    quantized, plain = (cache.compressed_layers[0] for cache in caches.values())
    scales, landmarks = quantized.landmark_scales, plain.landmarks
    quantized.check_state()
    plain.check_state()
    for wrong in (None, scales[..., 1:], scales.half(), -scales, scales * 0, scales * float("nan"), scales / 0):
        quantized.landmark_scales = wrong
        with pytest.raises(ValueError, match="`landmark_scales` must be"):
            quantized.check_state()
    plain.landmark_scales = scales
    with pytest.raises(ValueError, match="of layers that quantize"):
        plain.check_state()
    plain.landmark_scales, plain.landmarks = None, landmarks * float("nan")
    with pytest.raises(ValueError, match="`landmarks` must be finite"):
        plain.check_state()


@pytest.mark.usefixtures("_always_in_shadow")
@pytest.mark.parametrize("use", [lambda cache: cache.crop(-2), lambda cache: cache.crop(-30), ShadowKVCache.compress])
def test_a_cache_of_inference_mode_is_changed_outside(use: Callable[[ShadowKVCache], None]) -> None:
    model, tokens, logits = tiny_model("llama"), random_tokens(1, 64), []
    for mode in (torch.inference_mode, torch.no_grad):
        cache = ShadowKVCache(model.config, budget=16, rank=12, **SMALL)
        with mode():
            for part in (tokens[:, :60], *tokens[:, 60:63].split(1, dim=1)):
                model(part, past_key_values=cache)
        use(cache)
        with torch.no_grad():
            logits.append(model(tokens[:, 63:], past_key_values=cache).logits)
    assert torch.equal(*logits)


@pytest.mark.usefixtures("_always_in_shadow")
def test_gradients_are_refused_once_values_are_on_the_host() -> None:
    model, tokens = tiny_model("llama"), random_tokens(1, 60, seed=5)
    cache = ShadowKVCache(model.config, budget=8, **SMALL)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    with pytest.raises(NotImplementedError, match=r"Call the model under `torch.no_grad\(\)`"):
        model(tokens[:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"budget": 0}, "at least 1"),
        ({"budget": 1.5}, "positive integer, or a share"),
        ({"rank": True}, "positive integer, or a share"),
        ({"chunk_size": 0}, "at least 1"),
        ({"num_outlier_chunks": -1}, "at least 0"),
        ({"offload_interval": 0}, "at least 1"),
        ({"quantize": "int4"}, r"\['fp8', 'int8'\]"),
        ({"host": "cloud"}, "'memory', or 'disk:'"),
        ({"host": "disk:/no/such/folder"}, "a folder that exists"),
        ({"host": "disk:/proc"}, "no file can be made there"),
        ({"host_budget": "much"}, "`host_budget='much'` must be a number of bytes"),
        ({"host_budget": 0.5}, "`host_budget=0.5` must be a number of bytes"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShadowKVCache(tiny_model("llama").config, **arguments)


# Memory.


@pytest.mark.parametrize("num_tokens, budget", [(60 * 1024, 1024), (122 * 1024, 2048), (244 * 1024, 4096)])
@pytest.mark.parametrize("quantize, least_ratio", [(None, 6.0), ("int8", 10.0)])
def test_a_layer_of_llama_8b_takes_the_bytes_of_the_formula(
    quantize: str | None, least_ratio: float, num_tokens: int, budget: int
) -> None:
    """
    Tensors without numbers: a prompt, and steps until chunks have moved. Section 3.2 of the paper, with its third term mended and
    spreads beside the means; outliers as there, 24 chunks for 1,024 tokens of the budget.
    """
    rank, chunk_size, num_bands, num_tail = 160, 8, 4, 32 + 32 + 8
    num_outlier_chunks = budget // 1024 * 24
    with FakeTensorMode():
        model = SyntheticModel(1, 8, 4, 128)
        cache = ShadowKVCache(model.config, budget, num_outlier_chunks=num_outlier_chunks, quantize=quantize)
        (layer,) = cache.compressed_layers
        for width in (num_tokens, *[1] * 80):
            query = torch.randn(1, 32, width, 128, dtype=torch.bfloat16)
            key, value = (torch.randn(1, 8, width, 128, dtype=torch.bfloat16) for _ in range(2))
            model.run_layer(cache, 0, query, key, value, None)
            if width > 1:
                held = sum(tensor.nbytes for name, tensor in layer.held_tensors().items() if name != "host values")
                num_shadow = layer.row_shadow[0]
    assert layer.row_shadow[0] > num_shadow > num_tokens - 40
    width, stored_bytes = 8 * 128, 1 if quantize else 2
    landmarks = num_shadow // chunk_size * (width + 8 * num_bands)
    shadow = stored_bytes * (num_shadow * rank + landmarks) + 2 * rank * width
    slots = num_outlier_chunks * chunk_size + budget + num_tail
    assert held == pytest.approx(shadow + 2 * 2 * slots * width, rel=0.01)
    assert 2 * 2 * num_tokens * width / held >= least_ratio
