"""Past recording: tokens that `crop` may take back, alone and as assisted generation and prompt lookup use it."""

import copy

import pytest
import torch
from caches import CACHE_CASES, RECORDING_CASES, CacheCase, parametrize_cases
from models import Trace, build_model, drive, left_pad, random_rows, random_tokens, tiny_model
from test_masked_dense import assert_is_masked_run
from transformers import DynamicCache, PreTrainedModel

from pyramid_cache import ExpectedAttentionCache, H2OCache, KeyDiffCache, PyramidCache, SnapKVCache
from pyramid_cache.caches import streaming_llm
from pyramid_cache.engine.cache import CompressedCache


# How many tokens each forward pass brings, the first one behind the prompt, and how many of them `crop` takes back.
CHUNKS = [(5, 5), (1, 0), (6, 0), (6, 5), (4, 2), (1, 0), (20, 3), (20, 19), (6, 2), (3, 0)]


@torch.no_grad()
def record(model: PreTrainedModel, cache: CompressedCache, rows: list[torch.Tensor]) -> Trace:
    """
    Guesses and takes back: feeds left-padded prompts and then `CHUNKS`, and crops after each forward pass.

    Returns:
        What stayed: the logits of the last token of each chunk that stayed, and what was held after each `crop`.
    """
    cache.activate_past_recording()
    input_ids, mask = left_pad(rows)
    logits, positions, kept = [], [], []
    for step, (num_tokens, num_rejected) in enumerate(CHUNKS):
        earlier = mask.shape[1] if step else 0
        # The first chunk is the prompt and some guesses behind it.
        new = random_tokens(len(rows), num_tokens, seed=step)
        fed = new if step else torch.cat([input_ids, new], dim=1)
        num_kept = fed.shape[1] - num_rejected
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)[:, earlier:]
        output = model(fed, attention_mask=mask, position_ids=position_ids, past_key_values=cache).logits
        cache.crop(-num_rejected)
        mask = mask[:, : earlier + num_kept]
        logits.append(output[:, num_kept - 1])
        positions.append([cache.positions(layer).clone() for layer in range(len(cache.layers))])
        kept.append(fed[:, :num_kept])
    pieces = [piece.shape[1] for piece in kept[1:]]
    return Trace(torch.stack(logits, dim=1), positions, torch.cat(kept[1:], dim=1), [len(row) for row in rows], pieces)


def state_of(cache: CompressedCache) -> list[torch.Tensor]:
    """Positions, keys, values and scores in order of position, whatever slots the tokens are in."""
    state = []
    for layer in cache.compressed_layers:
        store = copy.copy(layer.store)  # with quantised keys and values as they are restored
        store.state = copy.copy(store.state)
        store.unpack()
        positions, (_, tensors_of) = layer.held_positions(), store.state_dict()
        order = positions.argsort(dim=-1)[..., -max(int((positions >= 0).sum(dim=-1).max()), 1) :]
        ranked = positions.gather(-1, order)
        state.append(ranked)
        tensors = [tensors_of["keys"], tensors_of["values"]]
        if "attention" in tensors_of:
            tensors.append(tensors_of["attention"].expand_as(positions)[..., None])
        for tensor in tensors:
            expanded = order[..., None].expand(-1, -1, -1, tensor.shape[-1])
            state.append(torch.where((ranked >= 0)[..., None], tensor.gather(2, expanded), 0))
    return state


@pytest.mark.parametrize("lengths", [(40,), (23, 40)], ids=["one", "padded"])
@pytest.mark.parametrize(
    ("short_name", "family"),
    [("pyramid-config", "gemma"), ("pyramid", "llama"), ("h2o", "phi3"), ("snapkv", "llama")],
)
def test_guesses_see_what_is_held_and_each_other(short_name: str, family: str, lengths: tuple[int, ...]) -> None:
    """Every chunk sees what the last `crop` left, and itself causally. What was taken back leaves no trace."""
    model, case = tiny_model(family), next(case for case in CACHE_CASES if case.short_name == short_name)
    rows = random_rows(lengths, seed=7)
    assert_is_masked_run(model, record(model, case.build(model), rows), rows)


def assert_same_state(cache: CompressedCache, other: CompressedCache, tolerance: float = 0.0) -> None:
    """Both hold the same, in whatever slots."""
    for one, another in zip(state_of(cache), state_of(other), strict=True):
        torch.testing.assert_close(one, another, atol=tolerance, rtol=0)
    assert cache.num_kept_tokens() == other.num_kept_tokens()
    assert cache.get_seq_length() == other.get_seq_length()


@parametrize_cases(RECORDING_CASES)
def test_what_stays_is_treated_as_if_it_had_come_alone(case: CacheCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    In a model of one layer, whose keys depend on nothing but their tokens, the caches end up the same.
    """
    monkeypatch.setattr(streaming_llm, "REBASE_INTERVAL", 32)
    model = build_model("llama", num_hidden_layers=1)
    for budget, lengths in (("tight", (40,)), ("tight", (23, 40)), ("large", (23, 40))):
        rows = random_rows(lengths, seed=7)
        guessed, plain = case.build(model, budget), case.build(model, budget)
        trace = record(model, guessed, rows)
        drive(model, plain, rows, trace.tokens)
        assert_same_state(guessed, plain, 1e-5)


@parametrize_cases(RECORDING_CASES)
@torch.no_grad()
def test_all_that_was_recorded_can_be_taken_back(case: CacheCase) -> None:
    """Over several forward passes, and the very first tokens too."""
    model, tokens = tiny_model("llama"), random_tokens(1, 60)
    cache, fresh = case.build(model), case.build(model)
    cache.activate_past_recording()
    for start, stop in ((0, 30), (30, 31), (31, 38)):
        model(tokens[:, start:stop], past_key_values=cache)
    assert cache.get_seq_length() == 38 and set(cache.num_kept_tokens()) == {38}
    cache.crop(-38)
    assert cache.get_seq_length() == 0
    output, wanted = (model(tokens[:, :44], past_key_values=each).logits[:, -1] for each in (cache, fresh))
    cache.crop(0)
    for each in (cache, fresh) if case.evicts else ():
        with pytest.raises(NotImplementedError, match="activate_past_recording"):
            each.crop(-3)
    if not case.prunes_prefill:  # a recorded prompt's hidden states are not pruned
        torch.testing.assert_close(output, wanted, atol=1e-5, rtol=0)
        assert_same_state(cache, fresh, 1e-5)
    assert cache.num_kept_tokens() == fresh.num_kept_tokens()


@pytest.mark.parametrize("cache_class", [ExpectedAttentionCache, H2OCache, KeyDiffCache, SnapKVCache])
@torch.no_grad()
def test_what_was_scored_and_taken_back_has_no_part_in_a_choice(cache_class: type[CompressedCache]) -> None:
    model, tokens = tiny_model("llama"), random_tokens(1, 80)
    cache, dynamic = cache_class(model.config, budget=64), DynamicCache(config=model.config)
    for each in (cache, dynamic):
        model(tokens[:, :45], past_key_values=each)
        each.crop(-15)
    output, wanted = (model(tokens[:, 30:60], past_key_values=each).logits for each in (cache, dynamic))
    assert torch.equal(output, wanted)
    if cache_class is KeyDiffCache:  # which looks at keys alone
        fresh = cache_class(model.config, budget=64)
        model(tokens[:, :60], past_key_values=fresh)
        for each in (cache, fresh):
            model(tokens[:, 60:], past_key_values=each)
        assert_same_state(cache, fresh, 1e-5)
    else:
        with pytest.raises(ValueError, match="has to evict.*`crop`"):
            model(tokens[:, 60:], past_key_values=cache)
        assert cache.num_kept_tokens() == [60] * 3


@parametrize_cases(RECORDING_CASES)
@torch.no_grad()
def test_nothing_waits_longer_than_it_must(case: CacheCase) -> None:
    """`generate` never ends a recording that it began: the next one does, and so does `record_past = False`."""
    model, tokens = tiny_model("llama"), random_tokens(1, 50)
    settings = {"do_sample": False, "max_new_tokens": 40}
    cache = case.build(model)
    output = model.generate(tokens, past_key_values=cache, prompt_lookup_num_tokens=3, **settings)
    held, num_bytes = cache.num_kept_tokens(), cache.nbytes
    assert all(layer.record_past and not layer.pending.chunks for layer in cache.layers)
    output = model.generate(output, past_key_values=cache, **settings)
    assert not any(layer.record_past for layer in cache.layers)
    if case.is_bounded:
        assert case.is_full(held) and case.is_full(cache.num_kept_tokens())
        cache.compress()  # and lets go of what the steps needed
        # How many of the tokens that a head keeps are older ones, which take less, is left to their scores.
        assert cache.nbytes <= num_bytes * (1.02 if case.quantizes else 1)
    else:
        assert max(cache.num_kept_tokens()) < 100 or not case.has_budget

    waiting, plain = case.build(model), case.build(model)
    waiting.activate_past_recording()
    for each in (waiting, plain):
        model(tokens, past_key_values=each)
    full = waiting.nbytes
    for layer in waiting.layers:
        layer.record_past = False
    assert waiting.num_kept_tokens() == plain.num_kept_tokens() and waiting.nbytes < full


@parametrize_cases(RECORDING_CASES)
@torch.no_grad()
def test_rows_and_copies_carry_what_is_recorded(case: CacheCase) -> None:
    """Selecting rows before a crop is selecting them after it; a copy goes its own way."""
    model = tiny_model("llama")
    input_ids, mask = left_pad(random_rows((23, 40, 31)))
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = case.build(model)
    cache.activate_past_recording()
    model(input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache)
    first, last = copy.deepcopy(cache), copy.deepcopy(cache)
    last.crop(-3)
    for each in (first, last):
        each.batch_select_indices(torch.tensor([2, 0, 0]))
        each.batch_repeat_interleave(2)
    assert first.compressed_layers[0].num_seen_per_row == [31, 31, 23, 23, 23, 23]
    first.crop(-3)
    assert first.batch_size == 6 and cache.get_seq_length() == 40 and first.get_seq_length() == 37
    assert_same_state(first, last)


@torch.no_grad()
def test_sliding_layers() -> None:
    """In a hybrid model transformers' own layers must be able to follow `crop`, or no layer moves."""
    model = build_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert "sliding_attention" in model.config.layer_types
    cache = H2OCache(model.config, budget=1.0)
    model(random_tokens(1, 20), past_key_values=cache)
    with pytest.raises(NotImplementedError, match="sliding window"):
        cache.crop(-2)
    assert cache.layers[0].get_seq_length() == 20
    draft, tokens = build_model("mistral", seed=3, sliding_window=8), random_tokens(1, 40)
    settings = {"do_sample": False, "max_new_tokens": 20, "assistant_model": draft}
    wanted = model.generate(tokens, **settings)
    for build in (H2OCache, PyramidCache):
        assert torch.equal(model.generate(tokens, past_key_values=build(model.config, budget=1.0), **settings), wanted)


@pytest.mark.parametrize("name", ["qwen2_hybrid", "gemma3", "llama4", "jamba", "bamba"])
@torch.no_grad()
def test_generate_ends_a_recording_of_hybrid_models(name: str) -> None:
    """Their sliding and linear layers go back to their size too."""
    model, tokens = build_model(name), random_tokens(1, 35)
    caches = [H2OCache(model.config, budget=1.0) for _ in range(2)]
    caches[0].activate_past_recording()
    for cache in caches:
        model(tokens[:, :30], past_key_values=cache)
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(*(model.generate(tokens, past_key_values=cache, **settings) for cache in caches))


@torch.no_grad()
def test_recordings_that_are_refused() -> None:
    """Right padding, what a dead model has recorded, and a budget without room for layers that keep everything."""
    model, tokens, mask = build_model("llama"), random_tokens(2, 60), torch.ones(2, 60, dtype=torch.long)
    cache, other = (H2OCache(model.config, budget=8) for _ in range(2))
    dense = PyramidCache(model.config, budget=20, first_pruned_layer=2)
    for each in (cache, other, dense):
        each.activate_past_recording()
    mask[0, -3:] = 0
    with pytest.raises(NotImplementedError, match="padded on the right"):
        model(tokens, attention_mask=mask, past_key_values=cache)
    model(tokens, past_key_values=dense)
    for _ in range(2):  # that changes no layer
        with pytest.raises(ValueError, match="too small for a prompt of 59"):
            dense.crop(-1)
    assert [layer.get_seq_length() for layer in dense.layers] == [60, 60, 60]
    model(tokens, past_key_values=other)
    del model
    stranger = build_model("llama")
    for call in (lambda: other.crop(0), lambda: stranger.generate(random_tokens(2, 65), past_key_values=other)):
        with pytest.raises(RuntimeError, match="is gone"):
            call()
