"""Thin keys: which channels stay, attention without the others, bytes, and everything that moves slots."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Trace, build_model, drive, generate, random_rows, random_tokens, tiny_model
from reference import masks_of, run_policy
from test_quantized import as_held, logits_of
from transformers import DynamicCache

from pyramid_cache import (
    AdaKVCache,
    AttentionMatchingCache,
    H2OCache,
    KnormCache,
    KVMergerCache,
    PyramidCache,
    SnapKVCache,
    StreamingLLMCache,
)
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.engine.quantization import Quantizer
from pyramid_cache.engine.ranks import HeadRanks
from pyramid_cache.engine.thin_keys import best_channels, mean_squares


BY_ATTENTION = {"budget": 12, "window_size": 4, "kernel_size": 3, "eviction_interval": 3}
# Caches with small settings: heads that share tokens, that do not, and that compete; nothing evicted; channels that
# are chosen late; and thin keys in codes.
CASES: dict[str, tuple[type[CompressedCache], dict[str, Any]]] = {
    "one by one": (KnormCache, {"budget": 12, "eviction_interval": 1, "thin_keys": 0.4, "residual_length": 4}),
    "shared": (H2OCache, {"budget": 12, "thin_keys": 0.3, "residual_length": 5}),
    "competing": (AdaKVCache, {**BY_ATTENTION, "thin_keys": 0.5, "residual_length": 4}),
    "each head": (SnapKVCache, {**BY_ATTENTION, "thin_keys": 0.4, "residual_length": 6}),
    "all": (KnormCache, {"budget": 1.0, "thin_keys": 0.6, "residual_length": 3}),
    "late": (KnormCache, {"budget": 1.0, "thin_keys": 0.4, "residual_length": 20}),
    "late, evicted": (SnapKVCache, {**BY_ATTENTION, "budget": 24, "thin_keys": 0.4, "residual_length": 20}),
    "in a byte": (SnapKVCache, {**BY_ATTENTION, "thin_keys": 0.4, "quantize": "int8", "residual_length": 6}),
    "in 4 bits": (AdaKVCache, {**BY_ATTENTION, "thin_keys": 0.25, "quantize": "kivi4", "residual_length": 4}),
}
every_case = pytest.mark.parametrize("name", CASES)


def test_channels_of_a_hand_computed_example() -> None:
    """Two query heads on one KV head, four channels, three keys of which one is padding."""
    query = torch.tensor([[[[1.0, 2, 0, 3], [1, 0, 4, 1]], [[3, 0, 2, 1], [1, 2, 2, 1]]]])
    positions, length = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([[[2]]], dtype=torch.int32)
    squares = mean_squares(query, positions, length, None, kv_heads=1)
    # (1 + 1 + 9 + 1) / 4, (4 + 0 + 0 + 4) / 4, (0 + 16 + 4 + 4) / 4, (9 + 1 + 1 + 1) / 4
    assert squares.tolist() == [[[3, 2, 6, 3]]]
    key = torch.tensor([[[[9.0, 9, 9, 9], [1, 2, 0, 1], [2, 1, 1, 1]]]])
    is_token = torch.tensor([[[False, True, True]]])
    # Without the padding sums of squares are 5, 5, 1, 2, and products 15, 10, 6, 6. Of the last two the later stays.
    kept = [best_channels(squares, key, is_token, number).tolist() for number in (1, 2, 3, 4)]
    assert kept == [[[[0]]], [[[0, 1]]], [[[0, 1, 3]]], [[[0, 1, 2, 3]]]]


def test_the_last_queries_count_whatever_passes_brought_them() -> None:
    query = torch.randn(2, 4, 80, 8, generator=torch.Generator().manual_seed(0))
    query[1, :, :7] = torch.nan  # padding

    def mean_after(ends: list[int]) -> torch.Tensor:
        mean, start = None, 0
        for end in ends:
            positions = torch.stack([torch.arange(start, end), torch.arange(start, end) - 7]).int().clamp(min=-1)
            length = torch.tensor([[[end]], [[max(end - 7, 0)]]], dtype=torch.int32)
            mean, start = mean_squares(query[:, :, start:end], positions, length, mean, kv_heads=2), end
        return mean

    for ends in ([80], [5, 80], [10, 48, 80], [40, 41, 42, 80]):
        wanted = query[:, :, 48:].square().view(2, 2, 2, 32, 8).mean(dim=(2, 3))
        torch.testing.assert_close(mean_after(ends), wanted)
    # Up to 32 tokens all count alike. Each step behind them takes over a part of the mean.
    all_of_them = query[0, :, :32].square().view(2, 2, 32, 8).mean(dim=(1, 2))
    torch.testing.assert_close(mean_after([1, *range(2, 33)])[0], all_of_them)
    newest = query[0, :, 32].square().view(2, 2, 8).mean(dim=1)
    torch.testing.assert_close(mean_after([*range(1, 34)])[0], all_of_them * 31 / 32 + newest / 32)


@dataclass
class ThinPolicy:
    """Who sees what, and how many of the first tokens each query sees with thin keys; loops over heads and queries."""

    trace: Trace
    row: int
    quantizer: Quantizer

    @property
    def ends(self) -> list[int]:
        """How many tokens the row had seen after each forward pass."""
        ends = [self.trace.lengths[self.row]]
        for piece in self.trace.pieces:
            ends.append(ends[-1] + piece)
        return ends

    def importance(self, layer: int, head: int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Of the channels of a KV head, when the first tokens leave the residual. `query` is that of its heads."""
        mean, start = torch.zeros(query.shape[-1]), 0
        for step, end in enumerate(self.ends):
            window = min(end, 32)
            new = [position for position in range(start, end) if position >= end - window]
            mean = mean * (1 - len(new) / window)
            for position in new:
                mean = mean + (query[:, position] ** 2).mean(dim=0) / window
            if self.quantizer.num_quantized(end):
                held = self.trace.held(step, layer, self.row, head)
                return mean * (key[held] ** 2).mean(dim=0)
            start = end
        raise AssertionError("no token leaves the residual")

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        kv_heads, _, width = key.shape
        group, mask = query.shape[0] // kv_heads, masks_of(self.trace, self.row, kv_heads)[layer]
        num_dropped, format_name = int(self.quantizer.thin_keys * width + 1e-9), self.quantizer.format
        output, starts = torch.empty_like(query), [0, *self.ends]
        for head in range(kv_heads):
            members = range(head * group, (head + 1) * group)
            importance = self.importance(layer, head, query[list(members)], key[head]).tolist()
            kept = sorted(sorted(range(width), key=lambda channel: importance[channel])[num_dropped:])
            thin_key, held_value = key[head][:, kept], value[head]
            if format_name is not None:
                thin_key = as_held(thin_key[None], format_name, self.group_of(len(kept)))[0]
                held_value = as_held(held_value[None], format_name, self.group_of(width))[0]
            held_key = torch.zeros_like(key[head])
            held_key[:, kept] = thin_key
            for start, end in zip(starts, self.ends, strict=False):
                thin = self.quantizer.num_quantized(start)
                keys = torch.cat([held_key[:thin], key[head, thin:]])
                values = torch.cat([held_value[:thin], value[head, thin:]])
                for position in range(start, end):
                    for member in members:
                        logits = keys @ query[member, position] * scaling
                        logits = logits.masked_fill(~mask[head, position], float("-inf"))
                        output[member, position] = logits.softmax(dim=-1) @ values
        return output

    def group_of(self, width: int) -> int:
        """How many channels share a scale: a whole head, or the largest power of two that divides 32 and the width."""
        return width if self.quantizer.format == "int8" else max(size for size in (1, 2, 4, 8, 16) if not width % size)


PIECES = [*[1] * 10, 6, *[1] * 6]


@every_case
def test_logits_are_those_of_a_masked_run_without_the_channels(name: str) -> None:
    """Steps and a later turn, of rows with padding, across the edges of blocks; the last row chooses channels late."""
    cache_class, settings = CASES[name]
    model, rows, later = build_model("llama"), random_rows((47, 23), seed=6), random_tokens(2, 22, seed=7)
    cache = cache_class(model.config, **settings)
    trace = drive(model, cache, rows, later, pieces=PIECES)
    for index, row in enumerate(rows):
        policy = ThinPolicy(trace, index, cache.compressed_layers[0].quantizer)
        wanted = run_policy(model, torch.cat([row, later[index]]), policy)[torch.tensor(policy.ends) - 1]
        torch.testing.assert_close(trace.logits[index], wanted, atol=2e-4, rtol=0)
        assert torch.equal(trace.logits[index].argmax(dim=-1), wanted.argmax(dim=-1))


@every_case
def test_rows_of_a_batch_are_what_they_are_alone(name: str) -> None:
    """Prompts of one token too. Their channels are chosen by queries of steps."""
    cache_class, settings = CASES[name]
    model, rows, later = tiny_model("qwen2"), random_rows((1, 17, 45, 31), seed=10), random_tokens(4, 44, seed=60)
    together = drive(model, cache_class(model.config, **settings), rows, later)
    for index, row in enumerate(rows):
        alone = drive(model, cache_class(model.config, **settings), [row], later[index : index + 1])
        # Noise of float32 that rounds a number the other way shows in codes.
        tolerance = 0.05 if "quantize" in settings else 2e-4
        torch.testing.assert_close(together.logits[index], alone.logits[0], atol=tolerance, rtol=0)


FURTHER = {
    "merges": (SnapKVCache, {**BY_ATTENTION, "merge": True}),
    "neighbours": (KVMergerCache, {"budget": 12, "threshold": 0.3, "eviction_interval": 3}),
    "pyramid": (PyramidCache, {"budget": 0.4}),
    "model": (SnapKVCache, {**BY_ATTENTION, "ranking": "model"}),
    "online": (SnapKVCache, {**BY_ATTENTION, "ranking": "model-online"}),
    "replays": (AttentionMatchingCache, {"budget": 12, "chunk_size": 16, "texts": ((5, 6), (5, 7), (8,))}),
}


@pytest.mark.parametrize("name", FURTHER)
def test_channels_of_zeros_are_not_missed(name: str) -> None:
    """Whatever a method does with keys that it holds."""
    cache_class, settings = FURTHER[name]
    model, rows = build_model("llama", initializer_range=0.05), random_rows((24, 30), seed=3)
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data.view(2, 2, 8, -1)[:, :, ::3] = 0  # RoPE pairs channels `i` and `i + 8`
    source = model if name in ("replays", "pyramid") else model.config
    wanted = drive(model, cache_class(source, **settings), rows, 12)
    cache = cache_class(source, **settings, thin_keys=0.375, residual_length=4)
    actual = drive(model, cache, rows, wanted.tokens)
    zeros = torch.tensor([0, 3, 6, 8, 11, 14])
    for layer in cache.compressed_layers:
        channels = layer.state.key_channels
        assert channels.shape[-1] == 10 and not torch.isin(channels, zeros).any() and layer.state.num_quantized
    torch.testing.assert_close(actual.logits, wanted.logits, atol=2e-5, rtol=0)


def test_restored_keys_have_zeros_in_the_channels_that_went() -> None:
    """And all else as it came, values too."""
    model, tokens = tiny_model("llama"), random_tokens(1, 50)
    cache, plain = KnormCache(model.config, 1.0, thin_keys=0.4, residual_length=4), DynamicCache(config=model.config)
    with torch.no_grad():
        for each in (cache, plain):
            model(tokens, past_key_values=each)
    layer, wanted = cache.layers[0], plain.layers[0]
    channels, num_thin = layer.state.key_channels, layer.state.num_quantized
    assert num_thin == 44 and channels.shape == (1, 2, 10)
    layer.store.unpack()
    assert torch.equal(layer.values, wanted.values) and torch.equal(layer.keys[:, :, 44:], wanted.keys[:, :, 44:])
    is_kept = torch.zeros(1, 2, 1, 16, dtype=torch.bool).scatter_(-1, channels[:, :, None], True)
    assert torch.equal(layer.keys[:, :, :44], wanted.keys[:, :, :44] * is_kept)


@pytest.mark.parametrize("length", [700, 1024])
@pytest.mark.parametrize(("ratio", "width"), [(0.2, 64), (0.4, 64), (0.6, 128)])
def test_bytes_are_those_of_the_formula(length: int, ratio: float, width: int) -> None:
    model = build_model("llama", hidden_size=64, head_dim=width, num_hidden_layers=2).bfloat16()
    cache = KnormCache(model.config, 1.0, thin_keys=ratio)
    with torch.no_grad():
        model(random_tokens(1, length), past_key_values=cache)
    residual = length - (length - 32) // 32 * 32
    of_a_head = 2 * (length - residual) * (1 - ratio) * width + 2 * residual * width + 2 * length * width + width / 8
    memory = cache.memory()["cpu"]
    assert memory["keys"] + memory["values"] == pytest.approx(2 * 2 * of_a_head, rel=0.01)
    assert memory["bookkeeping"] <= 2 * 2 * 4 * length + 128


def test_a_budget_in_bytes_pays_for_thin_keys() -> None:
    model = build_model("llama", hidden_size=64, head_dim=64)
    plain, thin = (
        SnapKVCache(model.config, "600kB", eviction_interval=8, **settings)
        for settings in ({}, {"thin_keys": 0.8, "residual_length": 8})
    )
    for cache in (plain, thin):
        generate(model, cache, random_rows((500,)), 40)
        assert cache.nbytes <= 600_000
    assert min(thin.num_kept_tokens()) > 1.3 * max(plain.num_kept_tokens())


@every_case
def test_files_beams_copies_and_later_turns(name: str, tmp_path: Path) -> None:
    """In the late cases one row has chosen its channels when the cache is saved, and the other has not."""
    cache_class, settings = CASES[name]
    model, rows, later = tiny_model("llama"), random_rows((20, 39), seed=2), random_tokens(2, 30, seed=4)
    cache = cache_class(model.config, **settings)
    drive(model, cache, rows, later[:, :4])
    assert (cache.layers[0].state.query_squares is not None) == name.startswith("late")
    cache.save(tmp_path / "cache.safetensors")
    loaded, copied = cache_class.load(tmp_path / "cache.safetensors", model), copy.deepcopy(cache)
    assert loaded.settings == cache.settings and loaded.nbytes <= cache.nbytes
    mask = torch.ones(2, 43, dtype=torch.long)
    mask[0, :19] = 0
    wanted = logits_of(model, cache, later[:, 4:], mask)
    for other in (loaded, copied):
        assert torch.equal(logits_of(model, other, later[:, 4:], mask), wanted)
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    mask = torch.cat([mask, torch.ones(2, 26, dtype=torch.long)], dim=1)[[1, 0, 1]]
    tokens = random_tokens(2, 5)[[1, 0, 1]]
    selected = logits_of(model, cache, tokens, mask)
    assert torch.equal(selected[0], selected[2])
    torch.testing.assert_close(selected[[1, 0]], logits_of(model, copied, tokens[[1, 0]], mask[[1, 0]]))


@every_case
@torch.no_grad()
def test_beams_guesses_and_their_channels(name: str) -> None:
    """Guesses that are taken back leave no trace. In the first layer, what others see makes no difference."""
    cache_class, settings = CASES[name]
    model, tokens = tiny_model("llama"), random_tokens(1, 46, seed=5)
    guessing, plain = (cache_class(model.config, **settings) for _ in range(2))
    guessing.activate_past_recording()
    for start, stop in ((0, 35), (35, 37), (37, 41), (41, 46)):
        model(torch.cat([tokens[:, start:stop], random_tokens(1, 3, seed=stop)], dim=1), past_key_values=guessing)
        guessing.crop(-3)
    for piece in (tokens[:, :35], *tokens[:, 35:].split(1, dim=1)):
        model(piece, past_key_values=plain)
    states = [cache.layers[0].state for cache in (guessing, plain)]
    assert torch.equal(states[0].key_channels, states[1].key_channels) and states[0].query_squares is None
    beams = generate(model, cache_class(model.config, **settings), [tokens[0, :26]], 20, num_beams=3)
    assert beams.sequences.shape == (1, 46)


@pytest.mark.parametrize("name", ["late", "each head", "in a byte"])
def test_damaged_files_are_refused(name: str, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    cache_class, settings = CASES[name]
    model, path = tiny_model("llama"), tmp_path / "cache.safetensors"
    cache = cache_class(model.config, **settings)
    drive(model, cache, random_rows((20, 43)), 1)
    cache.save(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {each: file.get_tensor(each) for each in file.keys()}
    fields = {"key_codes", "value_codes", "key_channels", "query_squares"} & {each.split(".")[2] for each in tensors}
    assert ("query_squares" in fields) == (name == "late")
    for field in sorted(fields):
        tensor, others = tensors[f"layers.1.{field}"], {k: v for k, v in tensors.items() if k != f"layers.1.{field}"}
        damages = [tensor[..., :-1].contiguous(), tensor[:0], tensor.double(), None]
        # One channel too low or too high.
        damages += [tensor - tensor.amin() - 1, tensor - tensor.amax() + 16] if field == "key_channels" else []
        for damage in damages:
            save_file(others if damage is None else others | {f"layers.1.{field}": damage}, path, metadata)
            with pytest.raises(ValueError, match=field):
                cache_class.load(path, model)


def test_errors_name_a_way_out() -> None:
    model = tiny_model("llama")
    for ratio in (-0.1, 1, 1.5, float("nan"), True, "0.4"):
        with pytest.raises(ValueError, match=r"thin_keys=.*\[0, 1\)"):
            SnapKVCache(model.config, 12, thin_keys=ratio)
    with pytest.raises(NotImplementedError, match="StreamingLLMPolicy rotates keys.*Leave `thin_keys` out"):
        StreamingLLMCache(model.config, 12, thin_keys=0.4)
    with pytest.raises(ValueError, match="10 wide without the channels that `thin_keys=0.4` drops.*int8"):
        generate(model, SnapKVCache(model.config, 12, thin_keys=0.4, quantize="kivi4"), random_rows((20,)), 2)
    with pytest.raises(NotImplementedError, match="`thin_keys=0.4`: gradients.*no_grad"):
        model(random_tokens(1, 9), past_key_values=SnapKVCache(model.config, 12, thin_keys=0.4))
    cache = KnormCache(model.config, 1.0, thin_keys=0.4)
    drive(model, cache, random_rows((70,)), 1)
    with pytest.raises(NotImplementedError, match="keys are thin"):
        cache.step()
    with pytest.raises(NotImplementedError, match="thinned their keys"):
        cache.crop(-1)
    competing = AdaKVCache(model.config, 12, thin_keys=0.4).layers[0]
    with pytest.raises(NotImplementedError, match="tensor parallelism.*`thin_keys=0.4`"):
        competing.set_ranks(HeadRanks(group=None, rank=0, size=2))


def test_tokens_that_were_taken_back_choose_no_channels() -> None:
    model, cache = tiny_model("llama"), KnormCache(tiny_model("llama").config, 1.0, thin_keys=0.4)
    drive(model, cache, random_rows((40,)), 2)
    cache.crop(-2)
    with torch.no_grad(), pytest.raises(ValueError, match="to choose channels"):
        model(random_tokens(1, 30), past_key_values=cache)


def test_nothing_changes_while_nothing_is_thin() -> None:
    model, rows = tiny_model("llama"), random_rows((50,))
    plain = drive(model, KnormCache(model.config, 1.0), rows, 5).logits
    for settings in ({"thin_keys": 0.4}, {"thin_keys": 0}, {"thin_keys": 0.01, "residual_length": 4}):
        cache = KnormCache(model.config, 1.0, **settings)
        actual = drive(model, cache, rows, 5).logits
        torch.testing.assert_close(actual, plain, atol=2e-5, rtol=0)
        assert ("thin_keys" in cache.settings) == bool(settings["thin_keys"])
        assert cache.is_croppable == ("residual_length" not in settings)
