"""MiniCache: shared directions by hand and by loops, logits of a dense run with merged tokens, bytes, and refusals."""

import copy
import math
from pathlib import Path

import pytest
import torch
from models import build_model, drive, generate, random_rows, random_tokens, tiny_model
from modes import Mode, fitting_modes
from transformers import DynamicCache, PreTrainedModel

from pyramid_cache import MiniCache
from pyramid_cache.caches.minicache.cache import pairs_from
from pyramid_cache.caches.minicache.merging import Merger, shared_directions


SMALL = {"start_layer": 0, "residual_length": 6, "block_length": 5, "outliers": 0.2}


def small_cache(model: PreTrainedModel, **settings) -> MiniCache:
    return MiniCache(model.config, **SMALL | settings)


@pytest.mark.parametrize("interpolation", [0.0, 0.25, 0.5, 0.6, 1.0])
@pytest.mark.parametrize("degrees", [0, 1, 60, 90, 170])
def test_directions_by_hand(degrees: int, interpolation: float) -> None:
    """In the plane the shared direction is that of the angle between: a share of the way from first to second."""
    angle = math.radians(degrees)
    first, second = torch.tensor([3.0, 0.0]), 4 * torch.tensor([math.cos(angle), math.sin(angle)])
    direction, found = shared_directions(first, second, interpolation)
    wanted = torch.tensor([math.cos(interpolation * angle), math.sin(interpolation * angle)])
    torch.testing.assert_close(direction, wanted, atol=1e-3, rtol=0)
    assert found.item() == pytest.approx(angle, abs=1e-3)
    merged = Merger(interpolation, 0, 1, 1).merge(first[None, None, None], second[None, None, None])
    for layer, norm in enumerate((3, 4)):
        torch.testing.assert_close(merged.restored(layer, 1)[0, 0, 0], norm * wanted, atol=4e-3, rtol=0)


def test_directions_that_have_none_between() -> None:
    """Opposite ones take that of the nearer layer; a vector of zeros has none, and the other's is shared."""
    x, zeros = torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2)
    for interpolation, wanted in ((0.6, -1.0), (0.4, 1.0)):
        direction, angles = shared_directions(x, -x, interpolation)
        assert direction.tolist() == [[0, wanted]] and angles.item() == pytest.approx(math.pi)
    for pair in ((x, zeros), (zeros, x)):
        assert shared_directions(*pair, 0.6)[0].tolist() == [[0, 1]]
    assert shared_directions(zeros, zeros, 0.6)[0].tolist() == [[0, 0]]


def merged_by_loops(
    first: torch.Tensor, second: torch.Tensor, interpolation: float, num_exact: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What two layers hold of a block `(tokens, width)`, by the formula of the paper, token by token."""
    found = torch.empty_like(first), torch.empty_like(second)
    angles = []
    for one, other in zip(first.tolist(), second.tolist(), strict=True):
        dot = sum(a * b for a, b in zip(one, other, strict=True))
        angles.append(math.acos(dot / (math.hypot(*one) * math.hypot(*other))))
    exact = sorted(range(len(angles)), key=lambda token: -angles[token])[:num_exact]
    for token, (one, other) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        if token in exact:
            found[0][token], found[1][token] = first[token], second[token]
            continue
        angle, norms = angles[token], (math.hypot(*one), math.hypot(*other))
        weights = math.sin((1 - interpolation) * angle), math.sin(interpolation * angle)
        for layer in range(2):
            for channel, (a, b) in enumerate(zip(one, other, strict=True)):
                direction = (weights[0] * a / norms[0] + weights[1] * b / norms[1]) / math.sin(angle)
                found[layer][token, channel] = direction * norms[layer]
    return found


class LoopCache(DynamicCache):
    """One row. After each forward pass, `merge` replaces keys and values of blocks that are due in pairs of layers."""

    def __init__(self, model: PreTrainedModel, pairs: list[tuple[int, int]], merger: Merger) -> None:
        super().__init__(config=model.config)
        self.pairs, self.merger, self.num_merged = pairs, merger, 0

    @property
    def compressed_layers(self) -> list:
        return []

    def merge(self) -> None:
        size = self.merger.block_length
        while self.num_merged + size <= self.get_seq_length() - self.merger.residual_length:
            block = slice(self.num_merged, self.num_merged + size)
            for one, other in self.pairs:
                for name in ("keys", "values"):
                    pair = [getattr(self.layers[layer], name) for layer in (one, other)]
                    for head in range(pair[0].shape[1]):
                        new = merged_by_loops(
                            *(states[0, head, block] for states in pair),
                            self.merger.interpolation,
                            self.merger.num_exact,
                        )
                        for states, numbers in zip(pair, new, strict=True):
                            states[0, head, block] = numbers
            self.num_merged += size


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "settings", [{}, {"outliers": 0.0, "interpolation": 0.3}, {"start_layer": 1, "block_length": 3}], ids=str
)
@pytest.mark.parametrize("pieces", [[*[1] * 17], [1, 1, 9, 1, 1, 1, 3]], ids=["steps", "turns"])
def test_logits_are_those_of_merged_tokens(family: str, settings: dict, pieces: list[int]) -> None:
    """Rows of a padded batch, each compared with a dense run of its own."""
    model, rows = build_model(family, num_hidden_layers=4), random_rows((14, 33, 5), seed=3)
    later = random_tokens(3, sum(pieces), seed=4)
    cache = small_cache(model, **settings)
    trace = drive(model, cache, rows, later, pieces=pieces)
    merger = cache.compressed_layers[-1].merger if settings.get("start_layer") != 1 else cache.layers[1].merger
    merged = [merger.num_merged(len(row) + sum(pieces)) for row in rows]
    assert cache.layers[1].state.row_quantized == merged
    for index, row in enumerate(rows):
        dense = LoopCache(model, cache.pairs, merger)
        wanted = drive(
            model, dense, [row], later[index : index + 1], lambda step, dense=dense: dense.merge(), pieces=pieces
        )
        assert dense.num_merged == merged[index]
        torch.testing.assert_close(trace.logits[index], wanted.logits[0], atol=3e-4, rtol=0)


def test_which_layers_are_pairs() -> None:
    assert pairs_from(2, [True] * 7) == {3: 2, 5: 4}
    assert pairs_from(3, [True] * 7) == {4: 3, 6: 5}
    assert pairs_from(0, [True, False, True, True, True]) == {3: 2}
    assert MiniCache(tiny_model("llama_multi_query").config).pairs == [(2, 3)]
    types = ["full_attention"] * 2 + ["sliding_attention"] * 2
    hybrid = build_model("gemma3", num_hidden_layers=4, layer_types=types)
    cache = small_cache(hybrid)
    generate(hybrid, cache, random_rows((20, 31)), 8)
    assert cache.pairs == [(0, 1)] and cache.layers[1].state.row_quantized == [20, 30]
    assert MiniCache(hybrid.config, start_layer=0).pairs == [(0, 1)]
    with pytest.raises(ValueError, match="start_layer=2.*Give at most 0,"):
        MiniCache(hybrid.config)
    with pytest.raises(ValueError, match="start_layer=0.*can share. Use another cache"):
        small_cache(build_model("llama", num_hidden_layers=1))


def test_nothing_changes_if_nothing_is_merged() -> None:
    model, rows = build_model("llama", num_hidden_layers=4), random_rows((21, 40), seed=1)
    plain = generate(model, DynamicCache(config=model.config), rows, 12)
    for settings, tolerance in (({"residual_length": 100}, 0), ({"outliers": 1.0}, 1e-4)):
        cache = small_cache(model, **settings)
        output = generate(model, cache, rows, 12)
        assert torch.equal(output.sequences, plain.sequences)
        for actual, wanted in zip(output.logits, plain.logits, strict=True):
            torch.testing.assert_close(actual, wanted, atol=tolerance, rtol=0)
        assert cache.is_croppable == (tolerance == 0)
        if cache.is_croppable:
            cache.crop(-2)
            assert cache.get_seq_length() == 49


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outliers", [0.0, 0.05, 0.2])
def test_bytes_are_those_of_the_formula(dtype: torch.dtype, outliers: float) -> None:
    """4TD + 8T + 0.05 * 4TD in two bytes, of a pair and head, where a full cache has 8TD."""
    model = build_model("llama", hidden_size=128, head_dim=64, num_hidden_layers=2).to(dtype)
    cache = MiniCache(model.config, start_layer=0, outliers=outliers)
    with torch.no_grad():
        model(random_tokens(3, 1060), past_key_values=cache)
    merged, size = 900, dtype.itemsize
    per_head = size * (2 * merged * 64 + 4 * merged + 2 * outliers * merged * 64) + size * 160 * 64 * 4
    memory = cache.memory()["cpu"]
    assert memory["keys"] + memory["values"] == pytest.approx(3 * 2 * per_head, rel=0.01)
    assert memory["bookkeeping"] <= 3 * 2 * 4 * 1060 + 64
    full = 3 * 2 * 4 * 1060 * 64 * size
    assert cache.nbytes < (0.7 if outliers == 0.2 else 0.65) * full


@torch.no_grad()
def logits_of(model: PreTrainedModel, cache: MiniCache, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The logits of tokens one by one, behind those that the mask shows."""
    logits = []
    for column in range(tokens.shape[1]):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        given = {"attention_mask": mask, "position_ids": mask.sum(dim=1, keepdim=True) - 1}
        logits.append(model(tokens[:, column : column + 1], past_key_values=cache, **given).logits[:, 0])
    return torch.stack(logits, dim=1)


def test_files_copies_and_rows(tmp_path: Path) -> None:
    model, rows, later = build_model("llama", num_hidden_layers=4), random_rows((20, 29), seed=2), random_tokens(2, 16)
    cache = small_cache(model)
    drive(model, cache, rows, later[:, :4])
    cache.save(tmp_path / "cache.safetensors")
    loaded, copied = MiniCache.load(tmp_path / "cache.safetensors", model), copy.deepcopy(cache)
    assert loaded.settings == cache.settings and loaded.nbytes <= cache.nbytes
    mask = torch.ones(2, 33, dtype=torch.long)
    mask[0, :9] = 0
    wanted = logits_of(model, cache, later[:, 4:], mask)
    for other in (loaded, copied):
        assert torch.equal(logits_of(model, other, later[:, 4:], mask), wanted)
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    mask = torch.cat([mask, torch.ones(2, 12, dtype=torch.long)], dim=1)[[1, 0, 1]]
    tokens = random_tokens(2, 9, seed=7)[[1, 0, 1]]
    selected = logits_of(model, cache, tokens, mask)
    assert torch.equal(selected[0], selected[2])
    torch.testing.assert_close(selected[[1, 0]], logits_of(model, copied, tokens[[1, 0]], mask[[1, 0]]))
    cache.reset()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0


def test_a_shorter_row_goes_on_alone(tmp_path: Path) -> None:
    """Once the longest row is gone, nothing of it is held, and the others go on as if they had been alone."""
    model, rows = build_model("llama", num_hidden_layers=4), random_rows((29, 9, 3), seed=4)
    tokens = random_tokens(3, 2)
    for row, num_merged in ((1, 5), (2, 0)):
        cache, alone = small_cache(model), small_cache(model)
        drive(model, cache, rows, tokens)
        drive(model, alone, [rows[row]], tokens[row : row + 1])
        cache.batch_select_indices(torch.tensor([row]))
        assert cache.layers[1].state.num_quantized == num_merged
        cache.save(tmp_path / "cache.safetensors")
        loaded = MiniCache.load(tmp_path / "cache.safetensors", model)
        seen, mask = len(rows[row]) + 2, torch.ones(1, 31, dtype=torch.long)
        mask[:, : 31 - seen] = 0
        for piece in (1, 2, 1, 3):
            mask = torch.cat([mask, torch.ones(1, piece, dtype=torch.long)], dim=1)
            new = {"input_ids": random_tokens(1, piece, seed=seen)}
            new["position_ids"] = torch.arange(seen, seen + piece)[None]
            with torch.no_grad():
                wanted = model(**new, past_key_values=alone).logits
                for each in (cache, loaded):
                    actual = model(**new, attention_mask=mask, past_key_values=each).logits
                    torch.testing.assert_close(actual, wanted, atol=2e-4, rtol=0)
            seen += piece


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    model, path = build_model("llama", num_hidden_layers=4), tmp_path / "cache.safetensors"
    cache = small_cache(model)
    drive(model, cache, random_rows((30,)), 1)
    cache.save(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {each: file.get_tensor(each) for each in file.keys()}
    for field in ("key_directions", "value_norms", "key_exact", "value_places"):
        tensor = tensors[f"layers.2.{field}"]
        for damage in (tensor[..., :-1].contiguous(), tensor.double(), None):
            changed = {name: each for name, each in tensors.items() if name != f"layers.2.{field}"}
            changed |= {} if damage is None else {f"layers.2.{field}": damage}
            save_file(changed, path, metadata)
            with pytest.raises(ValueError, match=field):
                MiniCache.load(path, model)
    save_file(
        tensors,
        path,
        {**metadata, "header": metadata["header"].replace('"row_quantized": [25]', '"row_quantized": [20]', 1)},
    )
    with pytest.raises(ValueError, match="tokens are merged"):
        MiniCache.load(path, model)


def test_generate_searches_beams_and_takes_guesses_back() -> None:
    model, rows = build_model("llama", num_hidden_layers=4), random_rows((26,), seed=5)
    plain = generate(model, small_cache(model), rows, 24).sequences
    guessed = generate(model, small_cache(model), rows, 24, prompt_lookup_num_tokens=3).sequences
    assert torch.equal(guessed, plain)


@pytest.mark.parametrize("mode", fitting_modes("next turn: full history"))
def test_modes_of_generate(mode: Mode) -> None:
    """As if each row had been fed alone. Models of three layers have a pair, and a layer that is left."""
    if mode.name == "`output_attentions`":
        with pytest.raises(NotImplementedError, match="output_attentions"):
            mode.run(small_cache)
        return
    mode.run(small_cache).verify()


def test_errors_name_a_way_out() -> None:
    model = build_model("llama", num_hidden_layers=4)
    for name, value in (
        ("start_layer", -1),
        ("start_layer", 3),
        ("interpolation", 1.5),
        ("outliers", -0.1),
        ("residual_length", 0),
        ("block_length", 300),
        ("block_length", 0),
    ):
        with pytest.raises(ValueError, match=f"`{name}={value}`"):
            MiniCache(model.config, **{name: value})
    with pytest.raises(NotImplementedError, match="no_grad"):
        model(random_tokens(1, 9), past_key_values=small_cache(model))
    cache = small_cache(model)
    drive(model, cache, random_rows((40,)), 1)
    with pytest.raises(NotImplementedError, match="layers share"):
        cache.step()
    with pytest.raises(NotImplementedError, match=r"crop\(-1\).*merged.*activate_past_recording"):
        cache.crop(-1)
    cache.activate_past_recording()
    with torch.no_grad():
        model(random_tokens(1, 3), past_key_values=cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 41


def test_layers_of_two_widths_are_refused() -> None:
    model = build_model("llama", num_hidden_layers=4)
    cache = small_cache(model)
    cache.update(*[torch.randn(1, 2, 9, 16)] * 2, 0)
    cache.layers[0].arrival = None
    with pytest.raises(ValueError, match="Layers 0 and 1 would be merged.*start_layer"):
        cache.layers[1].update(*[torch.randn(1, 2, 9, 8)] * 2)
