"""Half precision, and rows that are not a number: neither spreads to where it does not belong."""

import itertools
from functools import cache as remember

import torch
from caches import BUDGETS, PLAIN_CASES, CacheCase, pair_with_caches
from models import build_model, generate, left_pad, random_rows
from transformers import DynamicCache, PreTrainedModel

from pyramid_cache.engine.layer import CompressedLayer
from pyramid_cache.engine.selection import best_tokens
from pyramid_cache.engine.sharing import DividedBudget


LENGTHS = (25, 41, 33)
SPOILED = 1
OTHERS = [0, 2]
NEW_TOKENS = 6
NAN, INFINITY = float("nan"), float("inf")


@remember
def model_of(name: str = "llama", dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> PreTrainedModel:
    """A shared model in a dtype."""
    return build_model(name, seed=3, attention=attention).to(dtype)


@pair_with_caches("dtype", [torch.bfloat16, torch.float16])
def test_large_budgets_are_dynamic_cache_and_tight_ones_keep_the_dtype(dtype: torch.dtype, case: CacheCase) -> None:
    for name in ("llama", "qwen3_moe"):
        model, rows = model_of(name, dtype), random_rows(LENGTHS)
        wanted = generate(model, DynamicCache(config=model.config), rows, NEW_TOKENS)
        output = generate(model, case.build(model, "large"), rows, NEW_TOKENS)
        assert torch.equal(output.sequences, wanted.sequences)
        assert torch.equal(torch.stack(output.logits), torch.stack(wanted.logits))

        cache = case.build(model)
        assert torch.stack(generate(model, cache, rows, NEW_TOKENS).logits).isfinite().all()
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


@pair_with_caches(
    "spoilt", itertools.product([(NAN, 0), (INFINITY, 20), (NAN, -1)], BUDGETS, ["sdpa", "eager"]), PLAIN_CASES
)
def test_a_spoiled_row_stays_alone(spoilt: tuple[tuple[float, int], str, str], case: CacheCase) -> None:
    """The other rows give the logits and hold the positions that they do beside a clean row."""
    (value, column), budget, attention = spoilt
    model = model_of(attention=attention)
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
        assert all(layer.state.row_held == count_held(layer) for layer in cache.compressed_layers)
        heads = [layer.held_positions()[OTHERS].flatten(0, 1) for layer in cache.compressed_layers]
        positions = [sorted(held[held >= 0].tolist()) for layer_heads in heads for held in layer_heads]
        seen.append((torch.stack(output.logits), output.sequences[OTHERS], positions))
    (clean, clean_tokens, clean_positions), (spoiled, spoiled_tokens, spoiled_positions) = seen
    assert not spoiled[:, SPOILED].isfinite().all()
    # Sums over heads of different lengths are made in another order if the longest is another one.
    # So are those over quantised tokens, or with rows of budgets of their own, if a row has another number of them.
    has_own = isinstance(getattr(cache, "shared", None), DividedBudget)
    differs = not cache.compressed_layers[0].store.heads_keep_equal_numbers or case.quantizes or has_own
    torch.testing.assert_close(spoiled[:, OTHERS], clean[:, OTHERS], atol=2e-5 if differs else 0, rtol=0)
    assert torch.equal(spoiled_tokens, clean_tokens)
    assert spoiled_positions == clean_positions


def count_held(layer: CompressedLayer) -> list[int]:
    """How many tokens each row really holds: what the layer counts on the host, in a spoiled row too."""
    counts = (layer.held_positions() >= 0).sum(dim=-1)
    if layer.store.heads_keep_equal_numbers:
        assert (counts == counts[:, :1]).all()
    return (counts.sum(dim=-1) / counts.shape[1]).tolist()


def test_scores_that_are_no_numbers_protect_what_is_protected() -> None:
    """Of the tokens that are chosen, as many stay as ever."""
    priority = torch.tensor([[[INFINITY, NAN, 2.0, NAN, -INFINITY]]])
    assert best_tokens(priority, torch.tensor([3]), 3).tolist() == [[[0, 2, 3]]]
    assert best_tokens(priority, torch.tensor([5]), 5).tolist() == [[[0, 1, 2, 3, -1]]]


@pair_with_caches("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_torch_changes_nothing(dtype: torch.dtype, case: CacheCase) -> None:
    model, rows = build_model("llama"), random_rows((40, 31))
    wanted = generate(model, case.build(model), rows, 20)
    torch.set_default_dtype(dtype)
    try:
        output = generate(model, case.build(model), rows, 20)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(output.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(wanted.logits))
