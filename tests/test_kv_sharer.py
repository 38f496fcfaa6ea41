"""KVSharer: logits of a dense run whose layers are exchanged, bytes, the search for pairs by hand, and refusals."""

import copy
import json
from pathlib import Path

import pytest
import torch
from massive_models import massive_model
from models import build_model, drive, generate, random_rows, random_tokens, tiny_model
from modes import Mode, fitting_modes
from text_tokenizers import byte_tokenizer
from transformers import DynamicCache, PreTrainedModel

from pyramid_cache import KVSharerCache
from pyramid_cache.engine.fingerprint import architecture_of
from pyramid_cache.lab.cli import main
from pyramid_cache.lab.profile import sharing as search


SHARING = {4: 1, 2: 1, 5: 0}


class ExchangedCache(DynamicCache):
    """Holds everything; some layers are given the keys and values of others."""

    def __init__(self, model: PreTrainedModel, sharing: dict[int, int]) -> None:
        super().__init__(config=model.config)
        self.sharing = sharing

    @property
    def compressed_layers(self) -> list:
        return []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        super().update(key_states, value_states, layer_idx, *args, **kwargs)
        held = self.layers[self.sharing.get(layer_idx, layer_idx)]
        return held.keys, held.values


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_are_those_of_exchanged_layers(family: str) -> None:
    """Steps and a turn, of rows with padding: bit for bit."""
    model, rows = build_model(family, num_hidden_layers=6), random_rows((14, 33), seed=3)
    later = random_tokens(2, 17, seed=4)
    cache = KVSharerCache(model.config, SHARING)
    traces = [
        drive(model, each, rows, later, pieces=[*[1] * 9, 6, 1, 1]) for each in (cache, ExchangedCache(model, SHARING))
    ]
    assert torch.equal(traces[0].logits, traces[1].logits)
    assert cache.num_kept_tokens() == [50] * 6
    plain = drive(model, ExchangedCache(model, {}), rows, later, pieces=[*[1] * 9, 6, 1, 1])
    assert (traces[0].logits - plain.logits).abs().max() > 0.1
    for layer, lender in SHARING.items():
        assert torch.equal(cache.positions(layer), cache.positions(lender))
    keys = [keys for keys, *_ in cache]
    assert torch.equal(keys[4], keys[1]) and not torch.equal(keys[3], keys[1])


def test_without_sharing_it_is_dynamic_cache() -> None:
    model, rows = tiny_model("llama"), random_rows((20, 31))
    wanted, output = (
        generate(model, cache, rows, 9, num_beams=2)
        for cache in (DynamicCache(config=model.config), KVSharerCache(model, {}))
    )
    assert torch.equal(output.sequences, wanted.sequences)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sharing", [{}, {3: 2}, SHARING], ids=str)
def test_bytes_are_those_of_the_formula(sharing: dict[int, int], dtype: torch.dtype) -> None:
    model = build_model("llama", num_hidden_layers=6).to(dtype)
    cache = KVSharerCache(model.config, sharing)
    with torch.no_grad():
        model(random_tokens(3, 200), past_key_values=cache)
    memory, full = cache.memory()["cpu"], 6 * 2 * 3 * 2 * 200 * 16 * dtype.itemsize
    assert memory["keys"] + memory["values"] == full * (6 - len(sharing)) / 6
    assert memory["bookkeeping"] <= 6 * 3 * 8
    assert sum(layer.store.held_tensors().keys() >= {"keys"} for layer in cache.layers) == 6 - len(sharing)


@torch.no_grad()
def test_files_copies_rows_and_crop(tmp_path: Path) -> None:
    model, rows = build_model("llama", num_hidden_layers=6), random_rows((20, 29), seed=2)
    cache = KVSharerCache(model.config, SHARING)
    drive(model, cache, rows, random_tokens(2, 4))
    cache.save(tmp_path / "cache.safetensors")
    assert (tmp_path / "cache.safetensors").stat().st_size < 1.1 * cache.nbytes + 8192
    loaded, copied = KVSharerCache.load(tmp_path / "cache.safetensors", model), copy.deepcopy(cache)
    assert loaded.sharing == SHARING and loaded.nbytes <= cache.nbytes
    assert not any("keys" in loaded.layers[layer].held_tensors() for layer in SHARING)
    mask = torch.ones(2, 41, dtype=torch.long)
    mask[0, :9] = 0
    later, ids = random_tokens(2, 8, seed=5), mask.cumsum(dim=1)[:, -8:] - 1
    outputs = []
    for each in (cache, loaded, copied):
        outputs.append(model(later, attention_mask=mask, position_ids=ids, past_key_values=each).logits)
    assert torch.equal(outputs[1], outputs[0]) and torch.equal(outputs[2], outputs[0])
    # Tokens are taken back, and rows change places.
    cache.crop(-8)
    cache.reorder_cache(torch.tensor([1, 0]))
    again = model(later[[1, 0]], attention_mask=mask[[1, 0]], position_ids=ids[[1, 0]], past_key_values=cache).logits
    torch.testing.assert_close(again[[1, 0]], outputs[0], atol=1e-5, rtol=0)
    cache.reset()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0


@pytest.mark.parametrize("trained", [("k_proj", 0), ("k_proj", 1), ("k_proj", 3), ("q_proj", 4)], ids=str)
def test_gradients_pass(trained: tuple[str, int]) -> None:
    """Those of keys that another layer uses, and of the queries of that layer alone; steps write behind the keys."""
    model, tokens, gradients = build_model("llama", num_hidden_layers=6), random_tokens(1, 12), []
    model.requires_grad_(False)
    weight = getattr(model.model.layers[trained[1]].self_attn, trained[0]).weight.requires_grad_()
    for cache in (KVSharerCache(model.config, SHARING), ExchangedCache(model, SHARING)):
        model.zero_grad()
        loss = sum(
            model(piece, past_key_values=cache).logits.square().mean() for piece in tokens.split([10, 1, 1], dim=1)
        )
        loss.backward()
        gradients.append(weight.grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("mode", fitting_modes("prompt lookup"))
def test_modes_of_generate(mode: Mode) -> None:
    """As if each row had been fed alone."""
    mode.run(lambda model: KVSharerCache(model.config, {2: 0})).verify()


def test_layers_without_full_attention_are_left_alone() -> None:
    types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model = build_model("gemma3", num_hidden_layers=4, layer_types=types)
    cache = KVSharerCache(model.config, {2: 0})
    generate(model, cache, random_rows((20, 31)), 8)
    assert [type(layer).__name__[:9] for layer in cache.layers][1::2] == ["DynamicSl"] * 2
    for sharing, layer in (({2: 1}, 1), ({3: 0}, 3)):
        with pytest.raises(ValueError, match=f"layer {layer}, which has no full attention"):
            KVSharerCache(model.config, sharing)


# The search.


def test_distances_by_hand() -> None:
    """Of keys 5 and of values 1: 3. The farthest pair comes first; layers of other shapes are in no pair."""
    zeros, keys = torch.zeros(1, 2, 2), torch.tensor([[[3.0, 4.0], [3.0, 4.0]]])
    values = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    means = {0: (zeros, zeros), 1: (keys, values), 2: (2 * keys, zeros), 4: (torch.zeros(1, 2, 3), zeros)}
    found = search.pair_distances(means)
    assert found == pytest.approx({(2, 0): 5.0, (1, 0): 3.0, (2, 1): 3.0})
    assert list(found)[0] == (2, 0)


def test_chains_are_resolved() -> None:
    assert search.with_pair({}, 5, 3) == {5: 3}
    assert search.with_pair({3: 1}, 5, 3) == {3: 1, 5: 1}
    assert search.with_pair({5: 3, 6: 3}, 3, 1) == {5: 1, 6: 1, 3: 1}


@torch.no_grad()
def test_the_search_is_that_of_loops() -> None:
    model, texts = build_model("llama", num_hidden_layers=5, initializer_range=0.12), random_tokens(4, 9)
    cache = DynamicCache(config=model.config)
    wanted = model.model(texts, past_key_values=cache).last_hidden_state
    ranked = []
    for later in range(5):
        for earlier in range(later):
            total = 0.0
            for name in ("keys", "values"):
                one, other = (getattr(cache.layers[layer], name) for layer in (later, earlier))
                for head in range(2):
                    for token in range(9):
                        means = [sum(states[text, head, token] for text in range(4)) / 4 for states in (one, other)]
                        total += (means[0] - means[1]).norm().item() / (2 * 9) / 2
            ranked.append((-total, later, earlier))
    expected: dict[int, int] = {}
    similarities = []
    for _, later, earlier in sorted(ranked):
        if later in expected or len(expected) == 3:
            continue
        tried = search.with_pair(expected, later, earlier)
        found = model.model(texts, past_key_values=ExchangedCache(model, tried)).last_hidden_state
        cosines = [torch.cosine_similarity(found[i].flatten(), wanted[i].flatten(), dim=0).item() for i in range(4)]
        if sum(cosines) / 4 > 0.5:
            expected = tried
            similarities.append(sum(cosines) / 4)
    layers = search.find_sharing(model, texts, 3)
    assert {layer.layer: layer.uses for layer in layers} == expected and len(expected) > 1
    assert [layer.similarity for layer in layers] == pytest.approx(similarities, abs=1e-4)
    assert [layer.distance for layer in layers] == sorted((each.distance for each in layers), reverse=True)
    assert search.find_sharing(model, texts, 3, least_similarity=1.0) == []


def test_the_command_writes_a_profile_that_a_cache_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, model = tmp_path / "sharing.json", massive_model(magnitude=1e4, vocab_size=257)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    arguments = ["profile", str(tmp_path / "model"), "--device", "cpu", "--out", str(path), "--tokens", "20"]
    assert main([*arguments, "--sharing", "1"]) == 0
    record = json.loads(path.read_text())
    [row] = record["sharing"]
    assert row["similarity"] > 0.5 and record["settings"]["num_texts"] == 30
    assert f"{{{row['layer']}: {row['uses']}}}" in capsys.readouterr().out
    cache = KVSharerCache(model, path)
    assert cache.sharing == {row["layer"]: row["uses"]}
    with pytest.raises(ValueError, match="is of another model"):
        KVSharerCache(tiny_model("llama").config, path)
    assert main([*arguments, "--sharing", "9"]) != 0
    assert "only" in (message := capsys.readouterr().err) and "layers can share" in message
    assert main([*arguments, "--sharing", "1", "--plot", "p.png"]) != 0
    assert "Leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "sharing, problem",
    [
        ({0: 0}, "layer 0 cannot use the cache of layer 0"),
        ({1: 2}, "layer 1 cannot use the cache of layer 2"),
        ({3: 0}, "of the 3 layers"),
        ({2: -1}, "layer -1"),
        ({2: 1, 1: 0}, "layer 2 would use .* layer 1, which holds nothing: it uses that of layer 0"),
        ([(2, 1), (2, 0)], "twice"),
        ({"2": 1}, "must map layers to layers"),
        ({2: True}, "must map layers to layers"),
        (4, "must map layers to layers"),
        (None, "must map layers to layers"),
    ],
    ids=str,
)
def test_maps_that_cannot_be(sharing: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        KVSharerCache(tiny_model("llama").config, sharing)


def test_profiles_that_cannot_be(tmp_path: Path) -> None:
    config, path = tiny_model("llama").config, tmp_path / "p.json"
    whole = {"format": "pyramid_cache profile", "version": 1, "architecture": architecture_of(config)}
    for text, problem in (
        ("{", "no JSON"),
        ("[]", "no profile of layers that share"),
        (json.dumps(whole), "no profile of layers that share"),
        (json.dumps(whole | {"version": 2, "sharing": []}), "no profile of layers that share"),
        (json.dumps(whole | {"sharing": [{"layer": 2}]}), "damaged"),
        (json.dumps(whole | {"sharing": [{"layer": 9, "uses": 0}]}), "of the 3 layers"),
        (json.dumps(whole | {"architecture": {}, "sharing": []}), "another model"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=problem):
            KVSharerCache(config, path)
    with pytest.raises(FileNotFoundError):
        KVSharerCache(config, tmp_path / "none.json")


def test_what_it_cannot_do_is_refused_by_name() -> None:
    model = tiny_model("llama")
    cache = KVSharerCache(model.config, {2: 0})
    drive(model, cache, random_rows((20,)), 1)
    with pytest.raises(NotImplementedError, match="layers share"):
        cache.step()
    cache = KVSharerCache(model.config, {2: 0})
    cache.layers[0].update(*[torch.randn(1, 2, 9, 16)] * 2)
    with pytest.raises(ValueError, match="Layer 2 would use the cache of layer 0.*Leave the pair out"):
        cache.layers[2].update(*[torch.randn(1, 2, 9, 8)] * 2)
