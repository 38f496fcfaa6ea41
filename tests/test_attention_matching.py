"""Attention matching: its least squares beside other solvers, a layer in 64 bits by loops, and what it keeps."""

from typing import Any

import numpy as np
import pytest
import torch
from models import build_model, left_pad, random_rows, random_tokens, tiny_model
from scipy.optimize import nnls
from transformers import DynamicCache, PreTrainedModel

from pyramid_cache import AttentionMatchingCache, KVzipPlusCache, ReplayTexts, StreamingLLMCache
from pyramid_cache.caches.attention_matching import (
    MIN_RIDGE,
    MIN_WEIGHT,
    RIDGE,
    nonnegative_least_squares,
    ridge_regression,
)
from pyramid_cache.caches.snapkv import SnapKVPolicy


TEXTS = ReplayTexts((5, 6, 7), (5, 8), (9,))


def probabilities(rows: int, keys: int, seed: int) -> torch.Tensor:
    logits = 3 * torch.randn(rows, keys, generator=torch.Generator().manual_seed(seed))
    return logits.softmax(dim=-1)


@pytest.mark.parametrize("num_kept", [1, 5, 20])
def test_least_squares_are_those_of_scipy(num_kept: int) -> None:
    """As small a rest as scipy finds, to the weight that is the least; all segments of a batch at once."""
    attended = torch.stack([probabilities(60, 24, seed)[:, :num_kept] for seed in range(3)])
    totals = torch.ones(3, 60)
    weights = nonnegative_least_squares(attended, totals)
    assert weights.amin() >= MIN_WEIGHT
    for matrix, found in zip(attended.double().numpy(), weights.double().numpy(), strict=True):
        _, rest = nnls(matrix, np.ones(60))
        assert np.linalg.norm(matrix @ found - 1) <= rest * 1.01 + 1e-3


def test_ridge_regression_is_a_plain_solve() -> None:
    attended, wanted = probabilities(40, 9, 1), torch.randn(40, 5)
    old = torch.randn(9, 5)
    matrix, target, start = (each.double().numpy() for each in (attended, wanted, old))
    ridge = RIDGE * 2.5 + MIN_RIDGE
    # The same problem as ordinary least squares with a row for each slot below.
    stacked = np.concatenate([matrix, np.sqrt(ridge) * np.eye(9)])
    expected = np.linalg.lstsq(stacked, np.concatenate([target, np.sqrt(ridge) * start]), rcond=None)[0]
    found = ridge_regression(attended[None], wanted[None], old[None], torch.tensor([2.5]))[0]
    torch.testing.assert_close(found, torch.from_numpy(expected).float(), atol=1e-3, rtol=1e-3)


def replayed(model: PreTrainedModel, context: torch.Tensor) -> tuple[DynamicCache, list[torch.Tensor]]:
    """The context's keys and values, and of each layer the queries `(heads, queries, head_dim)` of a replay."""
    dense, queries = DynamicCache(config=model.config), []
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: queries.append(output))
        for layer in model.model.layers
    ]
    ids = torch.tensor([[*context.tolist(), *TEXTS.first, *TEXTS.suffix, *context.tolist()]])
    model(ids, past_key_values=dense)
    for hook in hooks:
        hook.remove()
    cos, sin = model.model.rotary_emb(queries[0], torch.arange(ids.shape[1])[None])
    rotated = []
    for output in queries:
        query = output.view(1, ids.shape[1], -1, model.config.head_dim).transpose(1, 2)
        half = query.shape[-1] // 2
        turned = torch.cat([-query[..., half:], query[..., :half]], dim=-1)
        rotated.append((query * cos[:, None] + turned * sin[:, None])[0, :, len(context) :])
    return dense, rotated


@torch.no_grad()
@pytest.mark.parametrize("ranking", ["head", "model"])
def test_a_layer_by_loops_in_64_bits(ranking: str) -> None:
    """What the reference queries get from the slots is what a solution in 64 bits, slot by slot, gives them."""
    model, context = build_model("llama"), random_tokens(30, seed=2)
    cache = AttentionMatchingCache(model, 9, texts=TEXTS, ranking=ranking)
    model(context[None], past_key_values=cache)
    dense, queries = replayed(build_model("llama"), context)
    for index, layer in enumerate(cache.layers):
        layer.store.unpack()
        held = layer.store.slots()
        keys, values = (getattr(dense.layers[index], name)[0, :, :30].double() for name in ("keys", "values"))
        group = queries[index].shape[0] // keys.shape[0]
        for head in range(keys.shape[0]):
            kept = held["positions"][0, head % held["positions"].shape[1]]
            order = [slot for slot in range(len(kept)) if kept[slot] >= 0]
            kept = kept[order].tolist()
            rows = queries[index][head * group : (head + 1) * group].flatten(0, 1).double()
            shares = ((rows @ keys[head].T) * keys.shape[-1] ** -0.5).softmax(dim=-1)
            wanted = shares @ values[head]
            bias = held["bias"][0, head, order].double()
            weighted = shares[:, kept] * bias.exp()
            weights, rest = nnls(shares[:, kept].numpy(), np.ones(len(rows)))
            assert (weighted.sum(dim=-1) - 1).norm() <= rest * 1.05 + 5e-3
            attended = weighted / weighted.sum(dim=-1, keepdim=True)
            gram = attended.T @ attended
            strength = shares[:, kept].square().sum(dim=0).mean()
            gram += (RIDGE * strength + MIN_RIDGE) * torch.eye(len(kept))
            old = values[head, kept]
            new = old + torch.linalg.solve(gram, attended.T @ (wanted - attended @ old))
            torch.testing.assert_close(held["values"][0, head, order].double(), new, atol=2e-3, rtol=1e-3)
            # It is worth it: the tokens alone are further away.
            plain = shares[:, kept] / shares[:, kept].sum(dim=-1, keepdim=True) @ old
            assert len(kept) == 30 or (attended @ new - wanted).norm() < 0.7 * (plain - wanted).norm()


@torch.no_grad()
def test_it_keeps_what_its_policy_keeps() -> None:
    """KVzip+ by default, or a policy of yours; without a replay if neither asks for one. Rows as they are alone."""
    model, rows = tiny_model("llama"), random_rows((22, 35), seed=6)
    ids, mask = left_pad(rows)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    arguments = {"attention_mask": mask, "position_ids": positions}
    later = random_tokens(2, 3, seed=7)
    kvzip = KVzipPlusCache(model, 8, texts=TEXTS)
    model(ids, past_key_values=kvzip, **arguments)
    for reference in ("replay", "prompt"):
        cache = AttentionMatchingCache(model, 8, texts=TEXTS, reference=reference)
        model(ids, past_key_values=cache, **arguments)
        assert all(torch.equal(cache.positions(index), kvzip.positions(index)) for index in range(len(cache.layers)))
        longer = torch.cat([mask, torch.ones_like(later)], dim=1)
        told = {"attention_mask": longer, "position_ids": longer.cumsum(-1)[:, -3:] - 1}
        found = model(later, past_key_values=cache, **told).logits
        for index, row in enumerate(rows):
            alone = AttentionMatchingCache(model, 8, texts=TEXTS, reference=reference)
            model(row[None], past_key_values=alone)
            wanted = model(later[index : index + 1], past_key_values=alone).logits
            torch.testing.assert_close(found[index : index + 1], wanted, atol=2e-3, rtol=1e-3)
    policy = SnapKVPolicy(window_size=4)
    for reference in ("replay", "prompt"):
        cache = AttentionMatchingCache(model, 8, texts=TEXTS, policy=policy, reference=reference)
        model(ids, past_key_values=cache, **arguments)
        assert cache.replays == (reference == "replay")
        assert cache.num_kept_tokens() == [8] * len(cache.layers)
        assert all(layer.state.bias.abs().amax() > 0 for layer in cache.layers)


@torch.no_grad()
def test_nothing_changes_without_eviction() -> None:
    model, prompt = tiny_model("llama"), random_tokens(1, 20)
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    wanted = model.generate(prompt, **settings)
    for budget in (1.0, 64):
        cache = AttentionMatchingCache(model, budget, texts=TEXTS)
        assert torch.equal(model.generate(prompt, past_key_values=cache, **settings), wanted)


@torch.no_grad()
@pytest.mark.parametrize("reference", ["replay", "prompt"])
def test_a_later_turn_is_matched_on_its_own(reference: str) -> None:
    """What stays of the first turn stays as it is; a short turn is only evicted from. In batches as well."""
    model, rows = tiny_model("llama"), random_rows((40, 29), seed=8)
    ids, mask = left_pad(rows)
    cache = AttentionMatchingCache(model, 30, texts=TEXTS, reference=reference, ranking="head", chunk_size=64)
    model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache)
    lengths = [len(row) for row in rows]
    for turn, length in enumerate((130, 20)):
        before = [known_slots(layer) for layer in cache.layers]
        mask = torch.cat([mask, torch.ones(2, length, dtype=torch.long)], dim=1)
        arguments = {"attention_mask": mask, "position_ids": mask.cumsum(-1)[:, -length:] - 1}
        model(random_tokens(2, length, seed=turn), past_key_values=cache, **arguments)
        for layer, earlier in zip(cache.layers, before, strict=True):
            now = known_slots(layer)
            stayed = [place for place in earlier if place in now]
            assert stayed
            for place in stayed:
                assert torch.equal(earlier[place][0], now[place][0]) and earlier[place][1] == now[place][1]
            new = [bias for (row, _, position), (_, bias) in now.items() if position >= lengths[row]]
            assert new and any(bias != 0 for bias in new) == (length == 130)
        lengths = [each + length for each in lengths]


def known_slots(layer: Any) -> dict[tuple[int, int, int], tuple[torch.Tensor, float]]:
    """Values and biases by row, head and position."""
    slots = layer.store.slots()
    bias = slots.get("bias", torch.zeros_like(slots["positions"]))
    return {
        (row, head, position): (slots["values"][row, head, slot], bias[row, head, slot].item())
        for row, heads in enumerate(slots["positions"].expand(*bias.shape).tolist())
        for head, held in enumerate(heads)
        for slot, position in enumerate(held)
        if position >= 0
    }


@torch.no_grad()
def test_protected_tokens_stay_as_they_are() -> None:
    model, prompt = tiny_model("llama"), random_tokens(1, 40)
    cache, dense = AttentionMatchingCache(model, 12, texts=TEXTS, protect=6), DynamicCache(config=model.config)
    for each in (cache, dense):
        model(prompt, past_key_values=each)
    for layer, whole in zip(cache.layers, dense.layers, strict=True):
        layer.store.unpack()
        for (_, head, position), (value, bias) in known_slots(layer).items():
            is_same = torch.equal(value, whole.values[0, head, position])
            assert is_same and bias == 0 if position < 6 else True
        assert layer.state.bias.abs().amax() > 0


@torch.no_grad()
def test_references_serve_the_eviction_after_their_prompt_alone() -> None:
    """A prompt that fits leaves none: what is generated is not matched, and rows may be selected."""
    model = tiny_model("llama")
    for reference in ("replay", "prompt"):
        cache = AttentionMatchingCache(model, 41, texts=TEXTS, reference=reference, eviction_interval=4)
        model(random_tokens(2, 40), past_key_values=cache)
        assert all(layer.compactor.references is None for layer in cache.layers)
        cache.batch_select_indices(torch.tensor([1]))
        for step in range(12):
            model(random_tokens(1, 1, seed=step), past_key_values=cache)


@torch.no_grad()
def test_a_matching_that_broke_off_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, count = tiny_model("llama"), [0]

    def fail(*arguments: Any) -> Any:
        count[0] += 1
        if count[0] == 2:
            raise MemoryError
        return ridge_regression(*arguments)

    cache = AttentionMatchingCache(model, 12, texts=TEXTS)
    monkeypatch.setattr("pyramid_cache.caches.attention_matching.ridge_regression", fail)
    with pytest.raises(MemoryError):
        model(random_tokens(1, 40), past_key_values=cache)
    with pytest.raises(RuntimeError, match=r"broke off.*Call `cache.reset\(\)`"):
        model(random_tokens(1, 1), past_key_values=cache)
    cache.reset()
    model(random_tokens(1, 40), past_key_values=cache)


def test_bad_calls() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="`reference='question'` is unknown: choose one of"):
        AttentionMatchingCache(model, texts=TEXTS, reference="question")
    with pytest.raises(ValueError, match="`num_references=0`"):
        AttentionMatchingCache(model, texts=TEXTS, num_references=0)
    with pytest.raises(ValueError, match=r"moves keys.*such as SnapKVPolicy"):
        AttentionMatchingCache(model, texts=TEXTS, policy=StreamingLLMCache(model.config, 8).policy)
    with pytest.raises(ValueError, match=r"way of its own.*Leave `merge` out"):
        AttentionMatchingCache(model, texts=TEXTS, merge=True)
    with pytest.raises(ValueError, match="give the model instead of its config"):
        AttentionMatchingCache(model.config, texts=TEXTS)
