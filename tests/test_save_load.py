"""Caches in files: what is loaded goes on bit for bit as what was saved, and no other file is taken for a cache."""

import copy
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import safetensors.torch
import torch
from caches import CACHE_CASES, CacheCase, every_cache
from models import (
    ARCHITECTURES,
    build_config,
    build_model,
    drive,
    generate,
    left_pad,
    random_rows,
    random_tokens,
    tiny_model,
)
from safetensors import safe_open
from test_streaming_llm import longrope_model
from transformers import PreTrainedModel

from pyramid_cache import H2OCache, MassiveActivationCache, SnapKVCache, StreamingLLMCache
from pyramid_cache.caches import streaming_llm
from pyramid_cache.engine import files
from pyramid_cache.engine.cache import CompressedCache


@torch.no_grad()
def feed(model: PreTrainedModel, cache: CompressedCache, tokens: torch.Tensor, **named: Any) -> torch.Tensor:
    """Logits of tokens `(batch, new)`; some layers of the model may have no positions to record."""
    return model(tokens, past_key_values=cache, **named).logits


def reloaded(cache: CompressedCache, folder: Path, source: Any) -> Any:
    """The cache, out of a file in the folder, for a model or its config."""
    cache.save(folder / "cache")
    return type(cache).load(folder / "cache", source)


def assert_goes_on_alike(
    model: PreTrainedModel, caches: list[CompressedCache], mask: torch.Tensor, steps: int = 5
) -> None:
    """
    All caches give the same bits for five tokens, a question of seven and some more tokens, and end with the same
    tokens in the same slots. `mask` `(batch, seen)` is over what they have seen.
    """
    pieces = [random_tokens(len(mask), 1, seed=seed) for seed in range(5 + steps)]
    pieces.insert(5, random_tokens(len(mask), 7))
    for piece in pieces:
        mask = torch.cat([mask, torch.ones_like(piece)], dim=-1)
        positions = (mask.cumsum(-1) - 1)[:, -piece.shape[1] :]
        first, *others = (feed(model, each, piece, attention_mask=mask, position_ids=positions) for each in caches)
        assert all(torch.equal(first, other) for other in others)
    for cache in caches[1:]:
        assert_holds_alike(cache, caches[0])


def assert_holds_alike(cache: CompressedCache, wanted: CompressedCache) -> None:
    """Both caches would write the same file: each number and each bit of each tensor."""
    for layer, other in zip(cache.compressed_layers, wanted.compressed_layers, strict=True):
        (numbers, tensors), (other_numbers, other_tensors) = layer.export_state(), other.export_state()
        assert numbers == other_numbers and tensors.keys() == other_tensors.keys()
        for name, tensor in tensors.items():
            assert tensor.dtype == other_tensors[name].dtype
            assert torch.equal(tensor.nan_to_num(), other_tensors[name].nan_to_num()), name


def filled(case: CacheCase, model: PreTrainedModel, budget: str, steps: int) -> tuple[CompressedCache, torch.Tensor]:
    """A cache that has seen three padded rows and some generated tokens, and the mask over them."""
    cache, rows = case.build(model, budget), random_rows((43, 57, 50), seed=1)
    drive(model, cache, rows, random_tokens(len(rows), steps, seed=2))
    _, mask = left_pad(rows)
    return cache, torch.cat([mask, torch.ones(len(rows), steps, dtype=mask.dtype)], dim=-1)


H2O = next(case for case in CACHE_CASES if case.cache_class is H2OCache)


@every_cache
def test_a_loaded_cache_goes_on_bit_for_bit(case: CacheCase, tmp_path: Path) -> None:
    """Right after a prompt and later, with and without evictions, in half precision too."""
    half = torch.float16 if CACHE_CASES.index(case) % 2 else torch.bfloat16
    for dtype, budget, steps, later_steps in (
        (torch.float32, "tight", 0, 8),
        (torch.float32, "tight", 30, 5),
        (torch.float32, "large", 3, 5),
        (half, "tight", 3, 5),
    ):
        model = tiny_model("llama") if dtype == torch.float32 else build_model("llama").to(dtype)
        given = case if dtype == torch.float32 else replace(case, from_model=True)  # `to` rounds frequencies
        cache, mask = filled(given, model, budget, steps)
        untouched = copy.deepcopy(cache)
        loaded = reloaded(cache, tmp_path, model if given.from_model else model.config)
        assert loaded.layers[0].keys.dtype == dtype
        assert loaded.num_kept_tokens() == cache.num_kept_tokens() and loaded.get_seq_length() == 57 + steps
        # A layer that grows by a token at a time has room for some more, which is not saved.
        assert loaded.memory()["cpu"]["keys"] <= cache.memory()["cpu"]["keys"]
        assert_goes_on_alike(model, [untouched, cache, loaded], mask, later_steps)


@pytest.mark.parametrize("name", ["gemma3", "llama4", "bamba"])
def test_layers_of_other_kinds(name: str, tmp_path: Path) -> None:
    """What a sliding layer may take back is not saved."""
    model = tiny_model(name)
    cache = H2OCache(model.config, budget=12)
    feed(model, cache, random_tokens(2, 40))
    loaded = reloaded(cache, tmp_path, model.config)
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in cache.layers]
    assert_goes_on_alike(model, [cache, loaded], torch.ones(2, 40, dtype=torch.long))
    if name == "gemma3":
        cache.activate_past_recording()
        feed(model, cache, random_tokens(2, 5))
        with pytest.raises(ValueError, match="taken back"):
            cache.save(tmp_path / "cache")
        cache.crop(-1)
        loaded = reloaded(cache, tmp_path, model)
        cache._is_user_defined = True  # as `generate` does, which ends the recording
        assert_goes_on_alike(model, [cache, loaded], torch.ones(2, cache.get_seq_length(), dtype=torch.long))


@pytest.mark.parametrize("name", ["llama_yarn", "", "gpt2"])
def test_sinks_that_move(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Angles that are counted anew every 20 tokens, frequencies of both kinds, and a model without any."""
    monkeypatch.setattr(streaming_llm, "REBASE_INTERVAL", 20)
    model = tiny_model(name) if name else longrope_model(3.0)
    cache, mask = filled(CacheCase("streaming", {"budget": 12}), model, "tight", 10)
    assert (cache.layers[0].state.base == 60) == (name != "gpt2")
    assert_goes_on_alike(model, [cache, reloaded(cache, tmp_path, model.config)], mask)


def test_a_budget_in_bytes_stays_what_it_was_for_the_rows_that_it_was_made_for(tmp_path: Path) -> None:
    """Rows that were repeated after the prompt would not fit any more."""
    model, rows = tiny_model("llama"), random_rows((43, 57), seed=1)
    cache = H2OCache(model.config, budget="24KiB")
    drive(model, cache, rows, 3)
    cache.batch_repeat_interleave(40)
    loaded = reloaded(cache, tmp_path, model)
    mask = torch.cat([left_pad(rows)[1], torch.ones(2, 3, dtype=torch.long)], dim=-1).repeat_interleave(40, dim=0)
    assert_goes_on_alike(model, [cache, loaded], mask, steps=3)


@every_cache
def test_whatever_can_be_done_with_a_cache_can_be_done_with_a_loaded_one(case: CacheCase, tmp_path: Path) -> None:
    """Generate from the full history or from new tokens, save again, and reset."""
    model, prompt, question = tiny_model("llama"), random_tokens(1, 40), random_tokens(1, 6, seed=1)
    source = model if case.from_model else model.config
    cache = case.build(model)
    feed(model, cache, prompt)
    loaded, other = (reloaded(cache, tmp_path, source) for _ in range(2))
    before = header_of(tmp_path / "cache")
    history = torch.cat([prompt, question], dim=1)
    settings = {"attention_mask": torch.ones_like(history), "max_new_tokens": 12, "do_sample": False}
    wanted = model.generate(history, past_key_values=cache, **settings)[:, 46:].tolist()
    assert model.generate(history, past_key_values=loaded, **settings)[:, 46:].tolist() == wanted
    assert_holds_alike(loaded, cache)
    assert model.generate(question, past_key_values=other, **settings)[:, 6:].tolist() == wanted

    loaded = reloaded(case.cache_class.load(tmp_path / "cache", source), tmp_path, source)
    assert header_of(tmp_path / "cache") == before
    loaded.reset()
    other = model if case.from_model else tiny_model("qwen2")
    output, wanted = (generate(other, each, [question[0]], 5).logits for each in (loaded, case.build(other)))
    assert torch.equal(torch.stack(output), torch.stack(wanted))


@pytest.mark.parametrize("cache_class", [StreamingLLMCache, MassiveActivationCache])
def test_keys_that_nobody_can_turn_yet_wait(cache_class: type[CompressedCache], tmp_path: Path) -> None:
    """Rotations show in the first forward pass with a loaded cache: `compress` before it changes nothing."""
    model, last = tiny_model("llama"), []
    cache = cache_class(model.config, budget=12, eviction_interval=8)
    with torch.no_grad():
        for num_new in (40, 1, 1, 1):
            model(random_tokens(2, num_new), past_key_values=cache)
        cache.save(tmp_path / "cache")
        loaded = cache_class.load(tmp_path / "cache", model)
        with pytest.raises(RuntimeError, match="next tokens before"):
            loaded.compress()
        for each in (cache, loaded):
            model(random_tokens(2, 1), past_key_values=each)
            each.compress()
            last.append(model(random_tokens(2, 1, seed=3), past_key_values=each).logits)
    assert torch.equal(*last)


def test_caches_that_cannot_be_saved(tmp_path: Path) -> None:
    model, prompt = tiny_model("llama"), random_tokens(1, 40)
    cache = H2OCache(model.config, budget=12)

    def refuse(match: str, place: Path = tmp_path / "cache", error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=match):
            cache.save(place)
        assert not list(tmp_path.iterdir())

    refuse("holds nothing that could be saved: run the model")
    feed(model, cache, prompt)
    for place in (tmp_path, tmp_path / "nowhere" / "cache"):
        refuse(str(place), place, OSError)
    cache.activate_past_recording()
    feed(model, cache, prompt[:, :5])
    refuse(r"may still be taken back. Settle them with `cache.crop\(0\)`")
    cache.crop(-2)
    cache.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), 0)
    refuse("cannot be saved.*broke off")
    cache.reset()
    refuse("holds nothing")
    feed(model, cache, prompt)
    with patch.object(cache, "settings", None):
        refuse("does not tell its settings")
    # Under autocast keys are rotated in float32. A file that could not be loaded would be noticed too late.
    cache = SnapKVCache(model.config, budget=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        feed(model, cache, prompt)
    refuse("filled under autocast.*Cast the model", error=NotImplementedError)


def test_an_interrupted_save_leaves_the_old_file(saved: Path) -> None:
    """A file has the permissions of a new one, and a link stays a link."""
    before, cache = saved.read_bytes(), H2OCache.load(saved, tiny_model("llama"))

    def half_of_a_file(tensors: Any, path: str, **named: Any) -> None:
        Path(path).write_bytes(b"half of a file")
        raise OSError("No space left on device")

    for place, name, error in (
        (files, "save_file", half_of_a_file),
        (files.os, "fsync", KeyboardInterrupt),
        (files.os, "replace", OSError),
    ):
        with patch.object(place, name, side_effect=error), pytest.raises((OSError, KeyboardInterrupt)):
            cache.save(saved)
        assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]

    link = saved.parent / "link"
    link.symlink_to(saved)
    saved.unlink()
    saved.touch()
    mode = saved.stat().st_mode
    cache.save(link)
    assert link.is_symlink() and not saved.is_symlink() and saved.stat().st_mode == mode


# Files that are none of ours, or no longer.


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An H2O cache that evicts, with padding, in a file."""
    cache, _ = filled(H2O, tiny_model("llama"), "tight", 2)
    cache.save(tmp_path / "cache")
    return tmp_path / "cache"


def header_of(path: Path) -> dict[str, Any]:
    """The header of a file."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["header"])


def test_files_that_hold_no_cache(saved: Path) -> None:
    """None, none that is whole, those of other programs, of another version and of other caches."""
    config, folder, whole = tiny_model("llama").config, saved.parent, saved.read_bytes()
    with pytest.raises(FileNotFoundError):
        H2OCache.load(folder / "nothing", config)
    os.mkfifo(folder / "pipe")
    for path in (folder, folder / "pipe"):
        with pytest.raises(ValueError, match="is no regular file. Give the file"):
            H2OCache.load(path, config)
    version = f"version '1', but this pyramid_cache reads version '{files.FORMAT_VERSION}'"
    broken = [whole[: len(whole) // 2], whole[:-1], b"", b"hello" * 1000, (2**63).to_bytes(8, "little")]
    broken.append(pickle.dumps(os.getcwd))  # which is not even read
    contents = [(content, "no whole safetensors file.*truncated") for content in broken]
    for metadata, match in (
        (None, "holds no cache"),
        ({"format": "pt"}, "holds no cache"),
        ({"format": "pyramid_cache", "version": "1"}, version),
    ):
        contents.append((safetensors.torch.save({"weight": torch.ones(3)}, metadata=metadata), match))
    for content, match in contents:
        saved.write_bytes(content)
        with pytest.raises(ValueError, match=match):
            H2OCache.load(saved, config)
    saved.write_bytes(whole)
    with pytest.raises(ValueError, match="holds a H2OCache, not a SnapKVCache: load .*H2OCache.load"):
        SnapKVCache.load(saved, config)
    with pytest.raises(ValueError, match="on the meta device"):
        H2OCache.load(saved, config, device="meta")


def test_models_of_another_architecture(saved: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5}
    others = {"num_key_value_heads": 4, "num_hidden_layers": 4, "rms_norm_eps": 1e-3, "rope_parameters": rope}
    for config, match in (
        *((build_config("llama", **{name: value}), f"which has `{name}` .*Load it") for name, value in others.items()),
        (build_config("qwen3"), "filled by another model, which has `model_type` 'llama' instead of 'qwen3'"),
        ({}, "must be the config of a model"),
    ):
        with pytest.raises(ValueError, match=match):
            H2OCache.load(saved, config)


def test_the_architecture_of_a_model_is_that_of_its_saved_config() -> None:
    """Nothing that a model adds to its config, and nothing that JSON cannot keep, makes a file foreign."""
    for name in ARCHITECTURES.keys() - {"gemma2", "gpt_oss"}:
        config, used = build_config(name), tiny_model(name).config
        reread = type(config).from_dict(json.loads(json.dumps(used.to_dict())))
        architectures = [files.architecture_of(each) for each in (config, used, reread)]
        assert architectures[0] == architectures[1] == architectures[2], name
    # These fields stand in `rope_parameters`, and beside them in some versions.
    config, other = build_config("glm4"), build_config("glm4")
    config.partial_rotary_factor, config.rope_theta = 0.5, 1e4
    other.partial_rotary_factor = other.rope_theta = None
    assert files.architecture_of(config) == files.architecture_of(other)
    other.rope_parameters = other.rope_parameters | {"partial_rotary_factor": 0.25}
    assert files.architecture_of(config) != files.architecture_of(other)


def test_models_with_other_weights(tmp_path: Path) -> None:
    """Noticed at once where the model is given, and before the first logits where only the config is."""
    model, prompt, path = build_model("llama"), random_tokens(1, 40), tmp_path / "cache"
    cache = H2OCache(model.config, budget=12)
    feed(model, cache, prompt)
    loaded = reloaded(cache, tmp_path, model.config)
    other, tuned, same = build_model("llama", seed=1), copy.deepcopy(model), copy.deepcopy(model)
    tuned.model.layers[-1].self_attn.v_proj.weight.data *= 1.001
    for wrong, match in ((other, "other weights"), (tuned, "other weights"), (copy.deepcopy(model).half(), "float32")):
        with pytest.raises(ValueError, match=match):
            H2OCache.load(path, wrong)
        with pytest.raises(ValueError, match=match):
            feed(wrong, H2OCache.load(path, model.config), prompt[:, :1])
    # What was saved before it was used is still bound to the first one.
    with pytest.raises(ValueError, match="with other weights"):
        reloaded(loaded, tmp_path, tuned)
    loaded = H2OCache.load(path, same)
    assert torch.equal(feed(same, loaded, prompt[:, :1]), feed(model, cache, prompt[:, :1]))
    # After a reset it is a new cache, for whatever model.
    loaded.reset()
    feed(other, loaded, prompt)


def test_weights_and_frequencies_that_the_file_does_not_tell(tmp_path: Path) -> None:
    """Weights that accelerate keeps elsewhere between forward passes, and frequencies that `to` has rounded."""
    model, prompt, path = build_model("llama"), random_tokens(1, 40), tmp_path / "cache"
    moved = {"q_proj": torch.nn.Linear(48, 64, bias=False, device="meta")}
    cache = H2OCache(model.config, budget=12)
    feed(model, cache, prompt)
    with patch.dict(model.model.layers[0].self_attn._modules, moved):
        cache.save(path)
    assert header_of(path)["weights"].keys() == {"2"}
    with patch.dict(model.model.layers[2].self_attn._modules, moved):
        H2OCache.load(path, model)
    with pytest.raises(ValueError, match="other weights"):
        H2OCache.load(path, build_model("llama", seed=1))
    model.to(torch.bfloat16)
    cache = StreamingLLMCache(model, budget=12)
    feed(model, cache, prompt)
    loaded = reloaded(cache, tmp_path, model)
    feed(model, loaded, prompt[:, :1])
    rotary = loaded.layers[0].rotary_of(model.model.layers[0].self_attn)
    assert torch.equal(rotary.inv_freq, model.model.rotary_emb.inv_freq.float())


def test_files_whose_parts_do_not_fit(saved: Path) -> None:
    """Tensors and numbers that are missing, unknown or of other shapes, and settings that no cache takes."""
    config, header, tensors = tiny_model("llama").config, header_of(saved), safetensors.torch.load(saved.read_bytes())
    keys, positions = tensors["layers.1.keys"], tensors["layers.1.positions"]
    first, second, third = header["layers"]
    numbers = {name: value for name, value in second["numbers"].items() if name != "num_seen"}
    for new_header, new_tensors, match in (
        ({}, {"layers.1.positions": positions[..., 1:].contiguous()}, "`positions` has the shape"),
        ({}, {"layers.1.next_position": torch.zeros(2, 1, 1, dtype=torch.int32)}, "`next_position` has the shape"),
        ({}, {"layers.1.other": keys.clone()}, "`other` has the shape"),
        ({}, {"layers.1.attention": tensors["layers.1.attention"].half()}, "`attention` is torch.float16 instead of"),
        ({}, {"layers.1.keys": keys.half()}, "keys are torch.float16 .* and values torch.float32"),
        ({}, {"layers.1.keys": None}, "layer 1 .*'keys'.* Make the cache again from its prompt"),
        ({"layers": [first, second | {"numbers": numbers}, third]}, {}, "layer 1 .*'num_seen'"),
        ({"layers": [first, second]}, {}, "its layers are .* instead of"),
        ({"settings": {"budget": -1}}, {}, "No H2OCache can be built with the settings in .*`budget"),
        ({"settings": {"width": 12}}, {}, "No H2OCache can be built with the settings in .*width"),
    ):
        text = json.dumps(header | new_header)
        metadata = {"format": "pyramid_cache", "version": files.FORMAT_VERSION, "header": text}
        changed = {name: tensor for name, tensor in (tensors | new_tensors).items() if tensor is not None}
        saved.write_bytes(safetensors.torch.save(changed, metadata))
        with pytest.raises(ValueError, match=match):
            H2OCache.load(saved, config)
