"""ShadowKVCache: against the full cache, a reference in loops, the truncated SVD, and what it must refuse."""

import copy
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ROPE_VARIANTS, build_model, random_tokens, tiny_model
from synthetic import SyntheticModel
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache, CompileConfig, DynamicCache, PreTrainedModel

from pyramid_cache import ShadowKVCache
from pyramid_cache.caches.shadow_kv.host import gather_through_host
from pyramid_cache.caches.shadow_kv.landmarks import band_matrix, landmarks_of, probe_of
from pyramid_cache.caches.shadow_kv.layer import ShadowKVLayer
from pyramid_cache.caches.shadow_kv.low_rank import gram_matrix
from pyramid_cache.ops.shadow import gather_values


SMALL = {"chunk_size": 4, "num_outlier_chunks": 2, "num_local_tokens": 4, "offload_interval": 6}
FULL_RANK = 10_000


@pytest.fixture
def _always_in_shadow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the slots would hold."""
    monkeypatch.setattr(ShadowKVLayer, "num_tokens_to_keep", lambda layer, row_length: 20)


always_in_shadow = pytest.mark.usefixtures("_always_in_shadow")


def shadow_cache(model: PreTrainedModel | SyntheticModel, **settings: Any) -> ShadowKVCache:
    """A cache with small chunks and a budget of two of them, unless `settings` say otherwise."""
    return ShadowKVCache(model.config, **{"budget": 8, **SMALL, **settings})


@torch.no_grad()
def read(
    model: PreTrainedModel, cache: Cache, tokens: torch.Tensor, pieces: list[int], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Feeds what a cache has not seen of tokens `(batch, length)`, so many at a time; `mask` `(batch, length)` is False
    for padding. Logits are `(batch, fed, vocabulary)`.
    """
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits, start = [], cache.get_seq_length()
    for width in pieces:
        new = slice(start, start + width)
        inputs = {"attention_mask": mask[:, : new.stop].long(), "position_ids": positions[:, new]}
        logits.append(model(tokens[:, new], **inputs, past_key_values=cache).logits)
        start = new.stop
    return torch.cat(logits, dim=1) * mask[:, start - sum(pieces) : start, None]


def conversation(model: PreTrainedModel, cache: Cache, paddings: list[int], lengths: list[int]) -> torch.Tensor:
    """The logits of turns of tokens, each but every second read at once, of rows that begin with so much padding."""
    tokens = random_tokens(len(paddings), sum(lengths), seed=1)
    mask = torch.arange(tokens.shape[1]) >= torch.tensor(paddings)[:, None]
    pieces = [width for index, length in enumerate(lengths) for width in ([length], [1] * length)[index % 2]]
    return read(model, cache, tokens, pieces, mask)


def held_by(cache: ShadowKVCache, layer_idx: int, row: int) -> list[set[int]]:
    """The positions that each head of a row holds as they were."""
    return [{*head} - {-1} for head in cache.positions(layer_idx)[row].tolist()]


@always_in_shadow
@pytest.mark.parametrize("name, paddings", [("llama", [0, 60, 31]), ("glm4", [0, 5]), ("phi3", [0]), ("gpt2", [0, 5])])
def test_full_rank_and_a_whole_budget_are_the_full_cache(name: str, paddings: list[int]) -> None:
    """Prompts, steps and a second turn, models with full, partial, interleaved and no RoPE."""
    model, lengths = tiny_model(name), [70, 32, 9, 20]
    cache = shadow_cache(model, budget=400, rank=FULL_RANK)
    found = conversation(model, cache, paddings, lengths)
    assert all(min(layer.state.row_shadow) > 0 for layer in cache.compressed_layers)
    expected = conversation(model, DynamicCache(config=model.config), paddings, lengths)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_what_the_slots_would_hold_stays_as_it_is() -> None:
    model = tiny_model("llama")
    cache = shadow_cache(model, budget=40)
    found = conversation(model, cache, [0, 5], [30, 20])
    assert torch.equal(found, conversation(model, DynamicCache(config=model.config), [0, 5], [30, 20]))


@always_in_shadow
def test_generate_is_that_of_the_full_cache() -> None:
    model = tiny_model("llama")
    settings = {"max_new_tokens": 16, "do_sample": False}
    for num_rows, name, value in (
        (2, "num_beams", 3),
        (2, "prefill_chunk_size", 16),
        (1, "prompt_lookup_num_tokens", 3),
    ):
        tokens, settings_of_mode = random_tokens(num_rows, 60, seed=5), {**settings, name: value}
        caches = DynamicCache(config=model.config), shadow_cache(model, budget=400, rank=FULL_RANK)
        assert torch.equal(*(model.generate(tokens, past_key_values=cache, **settings_of_mode) for cache in caches))


# A reference in loops.


class ReferenceShadow:
    """
    One row of a layer of ShadowKV with the settings `SMALL` on models without RoPE, one head and query at a time, in
    float64. A step attends to `num_sparse` chunks. There are `num_bands` bands of two dimensions at least.
    """

    def __init__(self, kv_heads: int, head_dim: int, num_sparse: int, rank: int, num_bands: int) -> None:
        self.num_sparse, self.rank, self.num_bands = num_sparse, rank, num_bands
        self.keys = self.values = self.rebuilt = torch.zeros(kv_heads, 0, head_dim).double()
        self.axes: torch.Tensor | None = None  # (rank, kv_heads * head_dim)

    @property
    def num_shadow(self) -> int:
        return self.rebuilt.shape[1]

    @property
    def num_tail(self) -> int:
        return self.keys.shape[1] - self.num_shadow

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """New tokens `(kv_heads, tokens, head_dim)`."""
        self.keys = torch.cat([self.keys, key.double()], dim=1)
        self.values = torch.cat([self.values, value.double()], dim=1)

    def move(self) -> None:
        """Full chunks but the local tokens go to the shadow; the first ones make the basis."""
        count = (self.num_tail - SMALL["num_local_tokens"]) // SMALL["chunk_size"] * SMALL["chunk_size"]
        if count <= 0:
            return
        joint = self.keys[:, self.num_shadow : self.num_shadow + count].transpose(0, 1).flatten(1)
        if self.axes is None:
            self.axes = torch.linalg.svd(joint, full_matrices=False).Vh[: self.rank]
        projected = (joint @ self.axes.T @ self.axes).unflatten(1, (len(self.keys), -1)).transpose(0, 1)
        self.rebuilt = torch.cat([self.rebuilt, projected], dim=1)

    def logits(self, chunks: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Of the mean of each of the `chunks` `(number, chunk_size, head_dim)`, and what each band may add to it."""
        logits, half = chunks.mean(dim=1) @ query, query.shape[0] // 2
        deviations = chunks.std(dim=1, correction=0)
        width = math.ceil(half / max(self.num_bands, 1))
        for band in range(self.num_bands):
            pairs = range(band * width, min((band + 1) * width, half))
            members = [*pairs, *(half + pair for pair in pairs)]
            logits = logits + query[members].abs().sum() * deviations[:, members].sum(dim=1) / (2 * width)
        return logits

    def attend(self, query: torch.Tensor, scaling: float) -> tuple[torch.Tensor, list[set[int]]]:
        """The output and query are `(heads, head_dim)`; also the tokens that each KV head attended to."""
        outputs, attended, size, num_outliers = [], [], SMALL["chunk_size"], SMALL["num_outlier_chunks"]
        for head, queries in enumerate(query.double().unflatten(0, (len(self.keys), -1))):
            chunks = self.keys[head, : self.num_shadow].unflatten(0, (-1, size))
            cosines = torch.cosine_similarity(chunks, chunks.mean(dim=1, keepdim=True), dim=-1)
            order = cosines.amin(dim=1).argsort().tolist()
            outliers, others = order[:num_outliers], sorted(order[num_outliers:])
            shares = [(scaling * self.logits(chunks[others], one)).softmax(dim=0) for one in queries]
            best = torch.stack(shares).amax(dim=0).argsort(descending=True)[: self.num_sparse]
            chosen = [*outliers, *(others[index] for index in best.tolist())]
            keys = torch.cat([self.rebuilt[head], self.keys[head, self.num_shadow :]])
            for chunk in outliers:
                keys[chunk * size : (chunk + 1) * size] = chunks[chunk]
            tokens = [token for chunk in chosen for token in range(chunk * size, (chunk + 1) * size)]
            tokens += range(self.num_shadow, len(keys))
            weights = (scaling * queries @ keys[tokens].T).softmax(dim=-1)
            outputs.append(weights @ self.values[head, tokens])
            attended.append(set(tokens))
        return torch.cat(outputs).float(), attended


def test_spreads_stay_within_float16() -> None:
    """Where the sum over a band of dimensions would not, of queries or of keys; the higher key counts."""
    query = torch.full((1, 1, 1, 256), 2100.0, dtype=torch.float16)
    keys = torch.stack([torch.zeros(256), torch.full((256,), 4000.0)])[None, None, None]
    bands = band_matrix(256, 4, query.dtype, query.device)
    probe, landmark = probe_of(query, bands).flatten(), landmarks_of(keys, 4).half().flatten()
    assert probe.isfinite().all() and landmark.isfinite().all()
    assert (probe.double() @ landmark.double()).item() == pytest.approx(256 * 2100 * 4000, rel=1e-3)


@pytest.mark.parametrize("kv_heads, group, rank, num_bands", [(2, 2, 7, 2), (1, 4, 3, 0), (3, 1, 18, 100)])
@torch.no_grad()
def test_steps_are_those_of_the_reference(kv_heads: int, group: int, rank: int, num_bands: int) -> None:
    """What is attended to and what comes of it, of rows that begin and move at different times."""
    paddings, num_prompt, num_steps, head_dim = [0, 7], 90, 60, 6
    model = SyntheticModel(1, kv_heads, group, head_dim)
    cache = shadow_cache(model, budget=12, rank=rank, num_spread_bands=num_bands)
    (layer,) = cache.compressed_layers
    generator = torch.Generator().manual_seed(kv_heads)
    references = [ReferenceShadow(kv_heads, head_dim, 3, rank, min(num_bands, head_dim // 2)) for _ in paddings]
    is_token = torch.arange(num_prompt + num_steps) >= torch.tensor(paddings)[:, None]
    stayed, last_query = set(), None
    for step in range(num_steps + 1):
        width = num_prompt if step == 0 else 1
        query = torch.randn(2, kv_heads * group, width, head_dim, generator=generator)
        # Neighbouring queries and keys are alike, as in text: chunks stay for some steps.
        query = query if last_query is None else 0.3 * query + 0.7 * last_query
        key, value = (torch.randn(2, kv_heads, width, head_dim, generator=generator) for _ in range(2))
        key[:, :, 1:] += key[:, :, :-1].clone()
        last_query = query[:, :, -1:]
        held = None if layer.state.held_chunks is None else layer.state.held_chunks.clone()
        mask = model.mask(is_token[:, : num_prompt + step], width, False)
        output = model.run_layer(cache, 0, query, key, value, mask)
        for row, reference in enumerate(references):
            first = 0 if step else paddings[row]
            reference.append(key[row, :, first:], value[row, :, first:])
            if step == 0:
                reference.move()
                continue
            expected, attended = reference.attend(query[row, :, 0], model.scaling)
            torch.testing.assert_close(output[row, 0], expected, atol=1e-4, rtol=0)
            if reference.num_tail < 4 + 6 + 4:  # else the tail has moved since
                assert held_by(cache, 0, row) == attended
            else:
                reference.move()
        if step:
            assert cache.num_kept_tokens() == [max(len(head) for row in range(2) for head in held_by(cache, 0, row))]
            stayed |= {*(held == layer.state.held_chunks).flatten().tolist()}
            assert layer.state.row_shadow == [reference.num_shadow for reference in references]
    assert stayed == {False, True}


# Rows of a batch.


@pytest.mark.parametrize("settings", [{"budget": 0.2, "rank": 0.8}, {"quantize": "int8"}], ids=["shares", "int8"])
def test_rows_do_what_they_do_alone(settings: dict[str, Any]) -> None:
    """Those that are exact for long, begin their shadow among steps, or have less to read in a turn, too."""
    model, pieces = tiny_model("llama"), [70, *[1] * 20, 9, *[1] * 8]
    tokens = random_tokens(4, sum(pieces), seed=3)
    mask = torch.arange(sum(pieces)) >= torch.tensor([0, 20, 50, 66])[:, None]
    mask[1, 90:94] = mask[2, 90] = False  # of the second turn
    together = shadow_cache(model, **settings)
    logits = read(model, together, tokens, pieces, mask)
    assert len({*together.compressed_layers[0].state.row_shadow}) > 2
    for row, first in enumerate(mask.int().argmax(dim=1).tolist()):
        alone = shadow_cache(model, **settings)
        own = slice(row, row + 1), slice(first, None)
        found = read(model, alone, tokens[own], [70 - first, *pieces[1:]], mask[own])
        if "quantize" in settings:  # numbers near the middle of two steps may be rounded to either
            scales = [cache.compressed_layers[0].state.landmark_scales for cache in (together, alone)]
            torch.testing.assert_close(scales[0][row], scales[1][0], atol=0, rtol=1e-4)
            continue
        torch.testing.assert_close(logits[row, first:], found[0], atol=1e-3, rtol=0)
        assert all(held_by(together, layer, row) == held_by(alone, layer, 0) for layer in range(3))


# Keys of low rank.

# By how they turn keys: every kind of frequencies, part of a head, in other pairs, and not at all.
LOW_RANK_MODELS = ["llama", *(f"llama_{variant}" for variant in ROPE_VARIANTS), "phi3", "glm4", "cohere", "gpt2"]


@always_in_shadow
@pytest.mark.parametrize("name", LOW_RANK_MODELS)
def test_rebuilt_keys_are_the_truncated_svd(name: str) -> None:
    """Of the keys before they are turned, turned again: all that depends on how a model turns them cancels out."""
    model, tokens, full = tiny_model(name), random_tokens(1, 100, seed=2), DynamicCache(config=tiny_model(name).config)
    read(model, full, tokens, [100])
    for given in (9, 0.9):
        cache = shadow_cache(model, rank=given)
        read(model, cache, tokens, [100])
        for layer, full_layer in zip(cache.compressed_layers, full.layers, strict=True):
            (num_shadow,), rank = layer.state.row_shadow, layer.state.factors.shape[-1]
            rotary = layer.shadow.rotary
            turns = rotary.model_angles(torch.arange(num_shadow)[None, None], 100)
            plain = rotary.rotate(full_layer.keys[:, :, :num_shadow].double(), -turns)
            left, singular, right = torch.linalg.svd(plain.transpose(1, 2).flatten(2)[0], full_matrices=False)
            energy = singular.square().cumsum(dim=0) / singular.square().sum()
            assert rank == 9 if given == 9 else energy[rank - 1] >= 0.9 > energy[rank - 2]
            truncated = (left[:, :rank] * singular[:rank]) @ right[:rank]
            expected = rotary.rotate(truncated[None].unflatten(2, (plain.shape[1], -1)).transpose(1, 2), turns)
            layer.state.outlier_chunks.fill_(-1)  # which are exact
            found = layer.store.in_order()["keys"][:, :, :num_shadow].double()
            assert ((found - expected).norm() / expected.norm()).item() < 1e-5


@always_in_shadow
def test_a_prompt_in_chunks_has_the_basis_of_all_of_it() -> None:
    """At full rank nothing is lost on the way: the axes are those of one reading."""
    model, tokens = tiny_model("llama"), random_tokens(1, 100, seed=2)
    caches = [shadow_cache(model, rank=FULL_RANK) for _ in range(2)]
    read(model, caches[0], tokens, [100])
    read(model, caches[1], tokens, [40, 25, 35])
    for layers in zip(*(cache.compressed_layers for cache in caches), strict=True):
        assert torch.equal(*(layer.state.outlier_chunks for layer in layers))
        torch.testing.assert_close(*(layer.state.landmarks for layer in layers), atol=1e-4, rtol=0)
        for layer in layers:
            layer.state.outlier_chunks.fill_(-1)
        torch.testing.assert_close(*(layer.store.in_order()["keys"] for layer in layers), atol=1e-3, rtol=0)
        grams = (gram_matrix(layer.state.basis.transpose(1, 2).flatten(2)) for layer in layers)
        torch.testing.assert_close(*grams, rtol=1e-3, atol=1e-2)


@always_in_shadow
@torch.no_grad()
def test_quantised_keys_are_near() -> None:
    """Of a prompt, and of generated tokens whose factors exceed all that the prompt had."""
    model, generator = tiny_model("llama"), torch.Generator().manual_seed(0)
    for quantize, tolerance in (("int8", 0.02), ("fp8", 0.05)):
        caches = [shadow_cache(model, rank=FULL_RANK, quantize=name) for name in (quantize, None)]
        for cache in caches:
            conversation(model, cache, [0, 5], [60])
        for layers in zip(*(cache.compressed_layers for cache in caches), strict=True):
            kv_heads, head_dim = layers[0].layout.kv_heads, layers[0].layout.key_dim
            key, value = (3 * torch.randn(2, kv_heads, 24, head_dim, generator=generator) for _ in range(2))
            for each in layers:
                positions = torch.tensor(each.state.row_lengths)[:, None, None] + torch.arange(24)
                each.state.row_lengths = [length + 24 for length in each.state.row_lengths]
                pairs = zip(each.store.outside(), (key, value, positions.int()), strict=True)
                each._arrange(*(torch.cat(pair, dim=2) for pair in pairs), [20] * 2)
            layer, other = layers
            assert layer.state.factors.dtype.itemsize == layer.state.landmarks.dtype.itemsize == 1
            for found, expected in (
                (layer.store.in_order()["keys"], other.store.in_order()["keys"]),
                (layer.state.landmarks.float() * layer.state.landmark_scales, other.state.landmarks),
            ):
                assert ((found - expected).norm() / expected.norm()).item() < tolerance


# Where values are.


@always_in_shadow
def test_values_in_a_file_are_the_same(tmp_path: Path) -> None:
    """A copy has a file of its own."""
    model, folder = tiny_model("llama"), f"disk:{tmp_path}"
    in_file, in_memory = (shadow_cache(model, budget=16, rank=12, host=host) for host in (folder, "memory"))
    assert torch.equal(*(conversation(model, cache, [0, 5], [70, 30, 9, 5]) for cache in (in_file, in_memory)))
    assert in_file.memory()["host"] == in_memory.memory()["host"]
    assert not list(tmp_path.iterdir())  # files without a name
    twin = copy.deepcopy(in_file)
    for layer, other in zip(in_file.compressed_layers, twin.compressed_layers, strict=True):
        assert other.shadow.values.tensor.untyped_storage().filename is not None
        assert torch.equal(layer.shadow.values.tensor, other.shadow.values.tensor)
        assert layer.shadow.values.tensor.data_ptr() != other.shadow.values.tensor.data_ptr()
    tokens, mask = random_tokens(2, 115, seed=9), torch.arange(115) >= torch.tensor([[0], [5]])
    found = read(model, twin, tokens, [1], mask)
    assert in_file.get_seq_length() == 114 and twin.get_seq_length() == 115
    assert torch.equal(found, read(model, in_file, tokens, [1], mask))


def test_the_host_reads_for_a_device_what_it_has_no_access_to() -> None:
    """As the op does where it has."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 3, 40, 5, generator=generator)
    incoming = torch.tensor([[[3, -1, 9], [-1, -1, -1], [0, 1, 2]], [[5, 4, -1], [7, -1, 8], [-1, 6, -1]]])
    buffers = [torch.full((2, 3, 12, 5), 7.0) for _ in range(2)]
    gather_values(buffers[0], values, incoming, chunk_size=4)
    gather_through_host(buffers[1], values, incoming, chunk_size=4)
    assert torch.equal(*buffers)


@always_in_shadow
def test_values_beyond_the_host_budget_are_refused_with_what_they_take() -> None:
    model, tokens = tiny_model("llama"), random_tokens(2, 76, seed=1)
    needed = 3 * 2 * 2 * 72 * 16 * 4  # layers, rows, heads, tokens, dimensions, bytes of a number
    with pytest.raises(ValueError, match=f"2 rows of 72 tokens take {needed:,} bytes on the host"):
        read(model, shadow_cache(model, host_budget=needed - 1), tokens, [76])
    cache = shadow_cache(model, host_budget=needed)
    read(model, cache, tokens, [76])
    assert cache.memory()["host"]["values"] == needed
    assert f"{cache.nbytes:,} bytes held, {needed:,} of them on the host" in cache.summary()


# Files.


@always_in_shadow
@pytest.mark.parametrize("quantize, num_local_tokens", [(None, 0), ("int8", 4), ("fp8", 4)])
def test_a_file_goes_on_as_the_cache_would(quantize: str | None, num_local_tokens: int, tmp_path: Path) -> None:
    """Through turns and steps. Values can go elsewhere, where the folder of their files is gone, say."""
    model, pieces, folder = tiny_model("llama"), [2, *[1] * 14, 9, 1, 5, 1], tmp_path / "values"
    folder.mkdir()
    settings = {"host": f"disk:{folder}", "host_budget": "1MiB", "num_local_tokens": num_local_tokens}
    cache = shadow_cache(model, budget=16, rank=12, quantize=quantize, **settings)
    conversation(model, cache, [0, 5], [70, 33])
    file, tokens = tmp_path / "cache.safetensors", random_tokens(2, 103 + sum(pieces), seed=8)
    mask = torch.arange(tokens.shape[1]) >= torch.tensor([[0], [5]])
    cache.save(file)
    expected = read(model, cache, tokens, pieces, mask)
    folder.rmdir()
    for arguments, message in (
        ({}, "a folder that exists"),
        ({"host": "memory", "host_budget": 8}, "`host_budget=8`"),
    ):
        with pytest.raises(ValueError, match=message):
            ShadowKVCache.load(file, model, **arguments)
    for host in ("memory", f"disk:{tmp_path}"):
        loaded = ShadowKVCache.load(file, model, host=host)
        assert loaded.settings["host_budget"] is None and loaded.memory()["host"]["values"] > 0
        assert torch.equal(read(model, loaded, tokens, pieces, mask), expected)


# Tokens that are taken back.


@always_in_shadow
def test_tokens_are_taken_back_out_of_the_shadow() -> None:
    """Also from what was filled in inference mode."""
    model, tokens = tiny_model("llama"), random_tokens(2, 95, seed=5)
    for num_back in (1, 20, 66):
        cache, full = shadow_cache(model, budget=400, rank=FULL_RANK), DynamicCache(config=model.config)
        with torch.inference_mode():
            read(model, cache, tokens, [60, *[1] * 15])
        cache.crop(-num_back)
        read(model, full, tokens, [75 - num_back])
        found, expected = (read(model, each, tokens, [1] * 12) for each in (cache, full))
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


@torch.no_grad()
def test_no_step_sees_what_was_taken_back() -> None:
    """Rows that lose chunks that were outliers, that are exact again, or that lose tokens of the tail alone."""
    model, tokens = tiny_model("llama"), random_tokens(1, 200, seed=1)
    for num_back, is_exact in ((60, False), (110, True), (3, False)):
        cache = shadow_cache(model, budget=16, rank=FULL_RANK, num_outlier_chunks=5)
        model(tokens[:, :150], past_key_values=cache)
        cache.crop(-num_back)
        assert (cache.compressed_layers[0].state.row_shadow == [0]) == is_exact
        for layer in cache.compressed_layers:
            is_free = layer.state.positions[..., None] < 0
            layer.keys.masked_fill_(is_free, 1e4)
            layer.values.masked_fill_(is_free, 1e4)
            assert layer.held_positions().max() == 149 - num_back
        logits = model(tokens[:, 150:151], past_key_values=cache).logits
        assert logits.abs().max() < 100
        assert all(
            (layer.held_positions() >= 0).sum() == 2 * layer.state.row_held[0] for layer in cache.compressed_layers
        )


def test_padding_of_a_later_turn_is_not_taken_back_as_tokens() -> None:
    model, mask = tiny_model("llama"), torch.ones(2, 90, dtype=torch.bool)
    mask[0, 80:87] = False
    cache = shadow_cache(model)
    read(model, cache, random_tokens(2, 90, seed=1), [80, 10], mask)
    with pytest.raises(NotImplementedError, match="padding in a later turn.*Take back at most 3"):
        cache.crop(-4)
    cache.crop(-3)
    assert cache.compressed_layers[0].state.row_lengths == [80, 87]
    cache = shadow_cache(model)
    read(model, cache, random_tokens(1, 70), [20])
    cache.crop(-10)  # before there is a shadow
    read(model, cache, random_tokens(1, 70), [60])
    assert [layer.state.num_croppable for layer in cache.compressed_layers] == [70] * 3


def test_what_is_refused() -> None:
    """Arguments; and gradients, once values are on the host."""
    model, tokens = tiny_model("llama"), random_tokens(1, 60, seed=5)
    for name, value, message in (
        ("budget", 0, "at least 1"),
        ("budget", 1.5, "positive integer, or a share"),
        ("rank", True, "positive integer, or a share"),
        ("chunk_size", 0, "at least 1"),
        ("num_outlier_chunks", -1, "at least 0"),
        ("offload_interval", 0, "at least 1"),
        ("quantize", "int4", r"\['fp8', 'int8'\]"),
        ("host", "cloud", "'memory', or 'disk:'"),
        ("host", "disk:/no/such/folder", "a folder that exists"),
        ("host", "disk:/proc", "no file can be made there"),
        ("host_budget", "much", "`host_budget='much'` must be a number of bytes"),
        ("host_budget", 0.5, "`host_budget=0.5` must be a number of bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            ShadowKVCache(model.config, **{name: value})
    cache = shadow_cache(model)
    read(model, cache, tokens, [60])
    with pytest.raises(NotImplementedError, match=r"Call the model under `torch.no_grad\(\)`"):
        model(tokens[:, :1], past_key_values=cache)


# Memory.


@pytest.mark.parametrize(
    "quantize, least_ratio, num_tokens, budget", [(None, 6.0, 60 * 1024, 1024), ("int8", 10.0, 122 * 1024, 2048)]
)
def test_a_layer_of_llama_8b_takes_the_bytes_of_the_formula(
    quantize: str | None, least_ratio: float, num_tokens: int, budget: int
) -> None:
    """
    That of section 3.2 of the paper, with its third term mended and spreads beside the means. Outliers are as there,
    24 chunks for 1,024 tokens of the budget. Tensors have no numbers; a prompt, and steps until chunks have moved.
    """
    rank, chunk_size, num_bands, num_tail, width = 160, 8, 4, 32 + 32 + 8, 8 * 128
    num_outlier_chunks = budget // 1024 * 24
    with FakeTensorMode():
        model = SyntheticModel(1, 8, 4, 128)
        cache = ShadowKVCache(model.config, budget, num_outlier_chunks=num_outlier_chunks, quantize=quantize)
        (layer,) = cache.compressed_layers
        for num_new in (num_tokens, *[1] * 41):
            query, key, value = (torch.randn(1, heads, num_new, 128, dtype=torch.bfloat16) for heads in (32, 8, 8))
            model.run_layer(cache, 0, query, key, value, None)
            if num_new > 1:
                held = sum(tensor.nbytes for name, tensor in layer.held_tensors().items() if name != "host values")
                num_shadow = layer.state.row_shadow[0]
    assert layer.state.row_shadow[0] > num_shadow > num_tokens - 40
    stored_bytes = 1 if quantize else 2
    landmarks = num_shadow // chunk_size * (width + 8 * num_bands)
    shadow = stored_bytes * (num_shadow * rank + landmarks) + 2 * rank * width
    slots = num_outlier_chunks * chunk_size + budget + num_tail
    assert held == pytest.approx(shadow + 2 * 2 * slots * width, rel=0.01)
    assert 2 * 2 * num_tokens * width / held >= least_ratio


# Steps of fixed shapes.


FIXED = {"budget": 16, "rank": 12, "num_outlier_chunks": 2}
# Prompts of which all rows have a shadow, of one length and of two, of which one row is exact, and of which all are.
FIXED_CASES = [
    ([0, 0], 90, {}),
    ([0, 30], 90, {"rank": 0.99, "budget": 0.2}),
    ([0, 60], 90, {"quantize": "int8", "num_outlier_chunks": 0}),
    ([0, 8], 20, {}),
]


class NoWaiting(TorchDispatchMode):
    """Refuses ops that read numbers from the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not str(function).startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("paddings, num_prompt, settings", FIXED_CASES)
@torch.no_grad()
def test_steps_of_fixed_shapes_do_the_same(paddings: list[int], num_prompt: int, settings: dict[str, Any]) -> None:
    """
    They read no number from the device, and tensors stay where they are while the tail moves to the shadow. Copies,
    later turns, and steps beyond the length that was told are right, too.
    """
    model, num_steps = tiny_model("llama"), 60
    tokens = random_tokens(len(paddings), num_prompt + num_steps + 30, seed=6)
    mask = torch.arange(tokens.shape[1]) >= torch.tensor(paddings)[:, None]
    expected, told, beyond = (shadow_cache(model, **{**FIXED, **settings}) for _ in range(3))
    for cache in (expected, told, beyond):
        read(model, cache, tokens, [num_prompt], mask)
    told.step(num_prompt + 2 * num_steps)
    beyond.step()
    assert told.is_compileable
    addresses = set()
    for index in range(num_steps):
        wanted = read(model, expected, tokens, [1], mask)
        if index == 40:
            left, told = told, copy.deepcopy(told)
            read(model, left, tokens.flip(0), [1], mask)
            told.step(num_prompt + 2 * num_steps)
            addresses.clear()
        steps = [layer._step for layer in told.compressed_layers]
        addresses.add(tuple(tensor.data_ptr() for step in steps for tensor in step.tensors().values()))
        with NoWaiting() if index == 5 else nullcontext():
            found = read(model, told, tokens, [1], mask)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
        torch.testing.assert_close(read(model, beyond, tokens, [1], mask), wanted, atol=1e-4, rtol=0)
        told.step()
        beyond.step()
        for layer in range(len(model.model.layers)):
            assert torch.equal(told.positions(layer), expected.positions(layer))
            assert torch.equal(beyond.positions(layer), expected.positions(layer))
        assert told.num_kept_tokens() == beyond.num_kept_tokens() == expected.num_kept_tokens()
    assert len(addresses) == 1 and all(max(layer.state.row_shadow) > 0 for layer in told.compressed_layers)
    wanted = read(model, expected, tokens, [20, 1, 1, 1], mask)
    for cache in (told, beyond):
        torch.testing.assert_close(read(model, cache, tokens, [20, 1, 1, 1], mask), wanted, atol=1e-3, rtol=0)


@torch.no_grad()
def test_without_a_shadow_fixed_shapes_leave_no_trace() -> None:
    """After them a cache holds all tokens in order again, and gives what DynamicCache gives."""
    model, tokens, mask = tiny_model("llama"), random_tokens(2, 40, seed=7), torch.ones(2, 40, dtype=torch.bool)
    mask[0, :5] = False
    cache, full = shadow_cache(model, budget=40), DynamicCache(config=model.config)
    wanted = read(model, full, tokens, [20, *[1] * 6, 14], mask)
    found = [read(model, cache, tokens, [20], mask)]
    for _ in range(6):
        cache.step(100)
        found.append(read(model, cache, tokens, [1], mask))
    cache.step()
    cache.release()
    keys = [layer.keys[:, :, :26] for layer in cache.compressed_layers]
    torch.testing.assert_close(keys, [layer.keys[:, :, :26] for layer in full.layers], atol=1e-4, rtol=0)
    assert all(layer.state.is_dense for layer in cache.compressed_layers) and cache.memory().get("host") is None
    found.append(read(model, cache, tokens, [14], mask))
    torch.testing.assert_close(torch.cat(found, dim=1), wanted, atol=1e-4, rtol=0)


@torch.no_grad()
def test_fixed_shapes_need_room_on_the_host() -> None:
    model, tokens = tiny_model("llama"), random_tokens(1, 90, seed=8)
    values_of_a_token = 3 * 2 * 16 * 4
    cache = shadow_cache(model, host_budget=values_of_a_token * 200)
    read(model, cache, tokens, [60])
    with pytest.raises(NotImplementedError, match="Steps cannot have fixed shapes"):
        cache.step(300)
    cache.step(200)
    assert cache.is_compileable


@pytest.mark.slow
@pytest.mark.parametrize("paddings, num_prompt, settings_of_cache", FIXED_CASES[:2] + FIXED_CASES[3:])
def test_a_compiled_answer_is_that_without_a_compiler(
    paddings: list[int], num_prompt: int, settings_of_cache: dict[str, Any]
) -> None:
    """In one graph, also where an answer makes the shadow begin."""
    model = build_model("llama", num_hidden_layers=2)
    tokens = random_tokens(len(paddings), num_prompt, seed=9)
    mask = (torch.arange(num_prompt) >= torch.tensor(paddings)[:, None]).long()
    compiled = CompileConfig(mode="default", fullgraph=True, dynamic=False)
    compiled._compile_all_devices = True
    answers, held = [], []
    for how in ({"disable_compile": True}, {"compile_config": compiled}):
        torch._dynamo.reset()
        counters.clear()
        cache = shadow_cache(model, **{**FIXED, **settings_of_cache})
        # The embedding of padding is zero, and so is its query, to which all chunks are equal.
        settings = {"max_new_tokens": 120, "do_sample": False, "suppress_tokens": [0], **how}
        answers.append(model.generate(tokens, attention_mask=mask, past_key_values=cache, **settings))
        held.append([cache.positions(layer).sort(dim=-1).values for layer in range(2)])
    assert torch.equal(*answers) and counters["stats"]["unique_graphs"] == 1
    assert all(torch.equal(*both) for both in zip(*held, strict=True))


def test_float64_is_refused_before_anything_is_stored() -> None:
    model = build_model("llama").double()
    cache = ShadowKVCache(model.config)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="not torch.float64: load"):
        model(random_tokens(1, 40), past_key_values=cache)
    assert cache.get_seq_length() == 0
