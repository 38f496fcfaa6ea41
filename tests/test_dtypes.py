"""Half precision, and rows that are not a number: neither spreads to where it does not belong."""

from functools import cache as remember

import pytest
import torch
from caches import CacheCase, every_budget, every_cache
from models import build_model, generate, left_pad, random_rows, random_tokens
from transformers import DynamicCache, PreTrainedModel

from pyramid_cache.engine.layer import CompressedLayer
from pyramid_cache.engine.selection import best_tokens
from pyramid_cache.ops.reference import lowest_slots


LENGTHS = (25, 41, 33)
SPOILED = 1
NEW_TOKENS = 6

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
every_model = pytest.mark.parametrize("name", ["llama", "qwen3_moe"])


@remember
def model_of(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The shared model in a dtype."""
    return build_model(name, seed=3).to(dtype)


@every_cache
@every_dtype
@every_model
def test_large_budgets_are_dynamic_cache(name: str, dtype: torch.dtype, case: CacheCase) -> None:
    model, rows = model_of(name, dtype), random_rows(LENGTHS)
    wanted = generate(model, DynamicCache(config=model.config), rows, NEW_TOKENS)
    output = generate(model, case.build(model, "large"), rows, NEW_TOKENS)
    assert torch.equal(output.sequences, wanted.sequences)
    assert torch.equal(torch.stack(output.logits), torch.stack(wanted.logits))


@every_cache
@every_dtype
@every_model
def test_tight_budgets_keep_the_dtype(name: str, dtype: torch.dtype, case: CacheCase) -> None:
    model = model_of(name, dtype)
    cache = case.build(model)
    logits = torch.stack(generate(model, cache, random_rows(LENGTHS), NEW_TOKENS).logits)
    assert logits.isfinite().all()
    for layer in cache.compressed_layers:
        held = layer.held_tensors()
        assert held["keys"].dtype == held["values"].dtype == dtype
        assert held["positions"].dtype == torch.int32
        if held.get("scores") is not None:
            assert held["scores"].dtype == torch.float32 and held["scores"].isfinite().all()
            assert (held["scores"] >= 0).all()


def spoiled_embeddings(model: PreTrainedModel, value: float | None, column: int) -> dict[str, torch.Tensor]:
    """A left-padded batch as embeddings, in one row of which one token holds `value` instead of numbers."""
    input_ids, attention_mask = left_pad(random_rows(LENGTHS))
    embeddings = model.get_input_embeddings()(input_ids).detach().clone()
    if value is not None:
        embeddings[SPOILED, column, ::2] = value
    return {"inputs_embeds": embeddings, "attention_mask": attention_mask}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "value, column", [(float("nan"), 0), (float("inf"), 20), (float("nan"), -1)], ids=["first", "middle", "last"]
)
@every_cache
@every_budget
def test_a_spoiled_row_stays_alone(case: CacheCase, budget: str, value: float, column: int, attention: str) -> None:
    """The other rows give the logits and hold the positions that they do beside a clean row."""
    model = remembered_llama(attention)
    others = [row for row in range(len(LENGTHS)) if row != SPOILED]
    seen = []
    for spoil in (None, value):
        cache = case.build(model, budget)
        output = model.generate(
            **spoiled_embeddings(model, spoil, column),
            past_key_values=cache,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert all(layer.row_held == count_held(layer) for layer in cache.compressed_layers)
        positions = [sorted(held.tolist()) for layer in cache.compressed_layers for held in heads_of(layer, others)]
        seen.append((torch.stack(output.logits), output.sequences[others], positions))
    (clean, clean_tokens, clean_positions), (spoiled, spoiled_tokens, spoiled_positions) = seen
    assert not spoiled[:, SPOILED].isfinite().all()
    # Sums over heads of different lengths are made in another order if the longest is another one.
    is_ragged = not cache.compressed_layers[0].heads_keep_equal_numbers
    torch.testing.assert_close(spoiled[:, others], clean[:, others], atol=2e-5 if is_ragged else 0, rtol=0)
    assert torch.equal(spoiled_tokens, clean_tokens)
    assert spoiled_positions == clean_positions


def count_held(layer: CompressedLayer) -> list[int]:
    """How many tokens each row really holds: what the layer counts on the host, in a spoiled row too."""
    counts = (layer.held_positions() >= 0).sum(dim=-1)
    if layer.heads_keep_equal_numbers:
        assert (counts == counts[:, :1]).all()
    return (counts.sum(dim=-1) / counts.shape[1]).tolist()


def heads_of(layer: CompressedLayer, rows: list[int]) -> list[torch.Tensor]:
    """For each head of some rows the positions held, without empty slots."""
    return [held[held >= 0] for held in layer.held_positions()[rows].flatten(0, 1)]


@remember
def remembered_llama(attention: str) -> PreTrainedModel:
    return build_model("llama", seed=3, attention=attention)


@every_cache
@every_budget
def test_a_spoiled_row_stays_alone_among_beams(case: CacheCase, budget: str) -> None:
    model = remembered_llama("sdpa")
    others = [row for row in range(len(LENGTHS)) if row != SPOILED]
    clean, spoiled = (
        model.generate(
            **spoiled_embeddings(model, value, 20),
            past_key_values=case.build(model, budget),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=3,
        )
        for value in (None, float("nan"))
    )
    assert torch.equal(spoiled[others], clean[others])


def test_scores_that_are_no_numbers_protect_what_is_protected() -> None:
    """The victim is the oldest token that may go, never an empty slot; of what is chosen, as many stay as ever."""
    scores, positions = torch.full((1, 1, 4), float("nan")), torch.tensor([[[-1, 7, 3, 5]]])
    protected = torch.tensor([[[True, False, True, False]]])
    assert lowest_slots(scores, positions, protected).item() == 3
    priority = torch.tensor([[[float("inf"), float("nan"), 2.0, float("nan"), float("-inf")]]])
    assert best_tokens(priority, torch.tensor([3]), 3).tolist() == [[[0, 2, 3]]]
    assert best_tokens(priority, torch.tensor([5]), 5).tolist() == [[[0, 1, 2, 3, -1]]]


@every_cache
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_of_torch_changes_nothing(case: CacheCase, dtype: torch.dtype) -> None:
    model, rows = build_model("llama"), random_rows((40, 31))
    wanted = generate(model, case.build(model), rows, 20)
    torch.set_default_dtype(dtype)
    try:
        output = generate(model, case.build(model), rows, 20)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(output.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(wanted.logits))


@every_budget
@every_cache
def test_one_token_at_a_time_after_inference_mode(case: CacheCase, budget: str) -> None:
    """What was made there is copied once, before the first step outside writes to it."""
    model, tokens = build_model("llama"), random_tokens(1, 31)
    outputs = []
    for mode in (torch.inference_mode, torch.no_grad):
        cache = case.build(model, budget)
        with mode():
            model(tokens[:, :30], past_key_values=cache)
        outputs.append(
            model.generate(tokens, past_key_values=cache, max_new_tokens=12, do_sample=False, eos_token_id=None)
        )
    assert torch.equal(*outputs)
