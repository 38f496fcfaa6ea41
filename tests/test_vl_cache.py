"""VLCache against loops over rows, heads, queries and keys, on models that read images; its budgets by hand."""

import math

import pytest
import torch
from models import left_pad, random_rows, random_tokens, tiny_model
from reference import best, masks_of
from test_architectures import TOLERANCE, run_masked
from transformers import DynamicCache, PreTrainedModel
from vision_models import (
    IMAGE,
    VisionRow,
    build_vision_model,
    drive_vision,
    ids_of,
    prompt_of,
    vision_model,
    whole_row,
)

from pyramid_cache import CriticalPolicy, PolicyCache, VLCache
from pyramid_cache.caches.vl_cache import SparsityState, VLPolicy


NAMES = ["llava", "qwen2_vl"]
# Images at different places, of another number and (Qwen) of other sizes; padding in front of the second row.
PROMPTS = [VisionRow((9, 6, 14), seed=1), VisionRow((5, 21), seed=2)]
NEXT_TOKENS = [[VisionRow((1,), seed) for seed in (10 + step, 20 + step)] for step in range(5)]
SETTINGS = {"budget": 14, "recent_ratio": 0.2, "eviction_interval": 2}


def behind_image(name: str, prompt: VisionRow) -> int:
    """The first position behind the last image of a row."""
    return max(index for index, token in enumerate(ids_of(name, prompt).tolist()) if token == IMAGE) + 1


def slow_sparsity(weights: torch.Tensor, first: int) -> float:
    """γ of a layer: `weights` `(heads, length, length)` are probabilities, queries from `first` on count."""
    sparsities = []
    for head in weights:
        seen = hardly = 0
        for query in range(first, len(head)):
            highest = max(head[query, : query + 1].tolist())
            for key in range(query + 1):
                seen += 1
                hardly += head[query, key].item() < 0.01 * highest
        sparsities.append(hardly / seen)
    return sum(sparsities) / len(sparsities)


def slow_budgets(sparsities: list[float], mean: int, length: int) -> list[float]:
    """β_l · length, where what layers lose or gain by clipping is taken from, or given to, the others."""
    densities = [1 - each for each in sparsities]
    least, total = max(math.floor(length / 100), 1), mean * len(densities)
    fixed: dict[int, float] = {}
    while True:
        free = [layer for layer in range(len(densities)) if layer not in fixed]
        scale = (total - sum(fixed.values())) / sum(densities[layer] for layer in free)
        shares = {layer: scale * densities[layer] for layer in free}
        excess = sum(max(each - length, 0) for each in shares.values())
        lack = sum(max(least - each, 0) for each in shares.values())
        # The larger of both is settled first, as it decides whether `scale` rises or falls.
        clipped = {layer: float(length) for layer, each in shares.items() if excess >= lack and each > length}
        clipped = clipped or {layer: float(least) for layer, each in shares.items() if each < least}
        if not clipped:
            return [fixed.get(layer, shares.get(layer, 0.0)) for layer in range(len(densities))]
        fixed |= clipped


def slow_kept(
    weights: list[torch.Tensor], first: int, kv_heads: int, mean: int, recent_ratio: float
) -> list[list[list[int]]]:
    """For each layer and KV head, the positions that stay."""
    length = weights[0].shape[-1]
    exact = slow_budgets([slow_sparsity(layer, first) for layer in weights], mean, length)
    numbers = [math.floor(each) for each in exact]
    remainders = sorted(range(len(exact)), key=lambda layer: (numbers[layer] - exact[layer], layer))
    for layer in remainders[: mean * len(exact) - sum(numbers)]:
        numbers[layer] += 1
    kept = []
    for layer, number in zip(weights, numbers, strict=True):
        num_recent = min(max(math.floor(recent_ratio * number), 1), max(number // 2, 1))
        heads = []
        for members in layer.chunk(kv_heads):
            scores = {key: float(members[:, first:, key].sum()) for key in range(length)}
            scores |= {key: math.inf for key in range(length - num_recent, length)}
            heads.append(best(scores, number))
        kept.append(heads)
    return kept


def weights_of(model: PreTrainedModel, name: str, prompt: VisionRow) -> list[torch.Tensor]:
    """The attention of each layer `(heads, length, length)` to a prompt that is read whole."""
    length = len(ids_of(name, prompt))
    masks = {index: torch.ones(1, 2, length, length, dtype=torch.bool).tril() for index in range(3)}
    _, probabilities = run_masked(model, masks, **whole_row(name, model, [prompt]))
    return [probabilities[index][0] for index in range(3)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_kept_tokens_and_logits_are_those_of_the_loops(name: str, attention: str) -> None:
    """In a padded batch: what the prompt leaves, and each logit of the tokens behind it."""
    model = build_vision_model(name, attention)
    cache = VLCache(model.config, **SETTINGS)
    trace = drive_vision(name, model, cache, PROMPTS, NEXT_TOKENS)
    numbers = []
    for index, prompt in enumerate(PROMPTS):
        first, length = behind_image(name, prompt), trace.lengths[index]
        weights = weights_of(model, name, prompt)
        sparsities = [cache.layers[layer].state.sparsity[index].item() for layer in range(3)]
        assert sparsities == pytest.approx([slow_sparsity(each, first) for each in weights], abs=1e-3)
        kept = slow_kept(weights, first, 2, mean=14, recent_ratio=0.2)
        assert [[trace.held(0, layer, index, head) for head in range(2)] for layer in range(3)] == kept
        numbers.append([len(heads[0]) for heads in kept])
        masks = {layer: mask[None] for layer, mask in enumerate(masks_of(trace, index, 2))}
        history = [prompt, *(turn[index] for turn in NEXT_TOKENS)]
        logits, _ = run_masked(model, masks, **whole_row(name, model, history))
        torch.testing.assert_close(trace.logits[index], logits[0, length - 1 :], atol=TOLERANCE, rtol=0)
        held = [len(trace.held(5, layer, index, 0)) for layer in range(3)]
        assert all(few <= now <= few + 1 for few, now in zip(numbers[-1], held, strict=True))  # an answer is bounded
    assert numbers[0] != numbers[1] and all(len(set(each)) > 1 for each in numbers)
    num_text = [trace.lengths[index] - behind_image(name, prompt) for index, prompt in enumerate(PROMPTS)]
    assert cache.layers[0].state.row_windows == num_text


def state_of(sparsity: list[float], kept: int, length: int) -> SparsityState:
    rows = len(sparsity)
    state = SparsityState(sparsity=torch.tensor(sparsity)[:, None, None])
    state.row_lengths, state.row_kept = [length] * rows, [kept] * rows
    return state


def test_budgets_by_hand() -> None:
    """
    100 tokens, of which three layers keep 30 on average. The first row: shares 0.5 : 0.25 : 0.25 of 90. The second:
    0.98 : 0.01 : 0.01 of 90 are 88.2, 0.9 and 0.9; the two are raised to 1, which the first gives. The third: at 60
    on average the first layer would keep 171 of 100, and the others share the 80 that it cannot.
    """

    def divided(sparsities: list[float], kept: int) -> list[int]:
        states = [state_of([each], kept, 100) for each in sparsities]
        return [row_kept[0] for row_kept in VLPolicy().divide(states)]

    assert divided([0.5, 0.75, 0.75], 30) == [45, 23, 22]  # 45, 22.5 and 22.5: of equals the earlier has more
    assert divided([0.02, 0.99, 0.99], 30) == [88, 1, 1]
    assert divided([0.05, 0.975, 0.975], 60) == [100, 40, 40]
    assert divided([0.5, 0.9, 0.9], 120) == [120, 120, 120]  # the prompt may grow up to it
    states = [state_of([0.5, 0.9], 30, 100), state_of([0.9, 0.5], 30, 100)]
    assert VLPolicy().divide(states) == [[50, 10], [10, 50]]  # each row has its own
    for state in states:
        state.row_protected = [20, 12]
    assert VLPolicy().divide(states) == [[40, 12], [20, 48]]


@pytest.mark.parametrize("name", NAMES)
def test_a_large_budget_is_dynamic_cache(name: str) -> None:
    model = vision_model(name)
    settings = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    caches = DynamicCache(config=model.config), VLCache(model.config, budget=500), VLCache(model, budget=1.0)
    wanted, *outputs = (
        torch.stack(model.generate(**prompt_of(name, PROMPTS), past_key_values=cache, **settings).logits)
        for cache in caches
    )
    assert all(torch.equal(output, wanted) for output in outputs)


def kept_positions(cache: VLCache) -> list[torch.Tensor]:
    return [cache.positions(index).sort(dim=-1).values for index in range(3)]


@torch.no_grad()
def test_what_tells_where_images_are() -> None:
    """Token types, ids and an argument say the same, each alone; without them, the last queries choose."""
    name = "llava"
    model = vision_model(name)
    inputs = prompt_of(name, PROMPTS)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    without_ids = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    spans = [(9, behind_image(name, prompt)) for prompt in PROMPTS]

    def kept(given: dict[str, torch.Tensor], **settings: object) -> tuple[list[int], list[torch.Tensor]]:
        cache = VLCache(model.config, **SETTINGS, **settings)
        model(**given, past_key_values=cache)
        return cache.layers[0].state.row_windows, kept_positions(cache)

    windows, positions = kept({key: inputs[key] for key in ("input_ids", "attention_mask")})
    assert windows == [14, 21]
    types = (inputs["input_ids"] == IMAGE).long()
    for given in (kept(without_ids, image_tokens=spans), kept({**without_ids, "mm_token_type_ids": types})):
        assert given[0] == windows and all(map(torch.equal, given[1], positions))
    assert kept(without_ids, image_tokens=[(0, 30), None])[0] == [61 - 30, 32]
    assert kept(without_ids, window_size=7)[0] == [7, 7]
    last = {"input_ids": inputs["input_ids"][:, :25], "attention_mask": inputs["attention_mask"][:, :25]}
    assert kept(last, window_size=5)[0] == [5, 5]  # nothing, or an image, is the last


@torch.no_grad()
def test_of_later_turns_all_text_is_behind_the_images_of_an_argument() -> None:
    """But not in rows without an image."""
    model = tiny_model("llama")
    cache = VLCache(model.config, 12, image_tokens=[(2, 9), None, (3, 24)], window_size=4)
    model(random_tokens(3, 30), past_key_values=cache)
    assert cache.layers[0].state.row_windows == [21, 4, 6]
    model(random_tokens(3, 10), past_key_values=cache)
    assert cache.layers[0].state.row_windows == [10, 4, 10]


@torch.no_grad()
def test_later_turns_choose_by_their_own_text() -> None:
    """A turn with an image chooses by the text behind that, one of text by its last queries."""
    name = "qwen2_vl"
    model = vision_model(name)
    turns = [[VisionRow((3, 9), 3), VisionRow((3, 9), 5)], [VisionRow((6,), 7), VisionRow((6,), 8)]]
    windows = []
    cache = VLCache(model.config, **SETTINGS, window_size=4)

    def note(step: int) -> None:
        windows.append(list(cache.layers[2].state.row_windows))
        held = [layer.state.row_held for layer in cache.layers]
        assert all(sum(numbers) <= 3 * 14 and min(numbers) >= 1 for numbers in zip(*held, strict=True))

    trace = drive_vision(name, model, cache, PROMPTS, turns, after_step=note)
    assert windows == [[15, 22], [10, 10], [4, 4]]  # Qwen's images end in a token of their own
    for index, prompt in enumerate(PROMPTS):
        masks = {layer: mask[None] for layer, mask in enumerate(masks_of(trace, index, 2))}
        history = [prompt, *(turn[index] for turn in turns)]
        logits, _ = run_masked(model, masks, **whole_row(name, model, history))
        ends = trace.lengths[index] - 1 + torch.tensor([0, *trace.pieces]).cumsum(0)
        torch.testing.assert_close(trace.logits[index], logits[0, ends], atol=TOLERANCE, rtol=0)


def test_bad_settings() -> None:
    config = tiny_model("llama").config
    for ranking in ("model", "model-online"):
        with pytest.raises(ValueError, match="gives each layer a budget of its own"):
            VLCache(config, 8, ranking=ranking)
    with pytest.raises(ValueError, match="divides the budget over layers.*PyramidKVPolicy"):
        PolicyCache(config, 8, CriticalPolicy(VLPolicy()))
    with pytest.raises(NotImplementedError, match="Use another cache"):
        VLCache(config, 8).activate_past_recording()


@torch.no_grad()
def test_spans_that_do_not_fit_a_prompt() -> None:
    """They are refused before anything is stored."""
    model = tiny_model("llama")
    ids, mask = left_pad(random_rows((30, 20)))
    for spans, message in (([(1, 4)] * 3, "spans for 3 rows.*given 2"), ((2, 25), r"\(2, 25\).*row 1.*20 tokens")):
        cache = VLCache(model.config, 8, image_tokens=spans)
        with pytest.raises(ValueError, match=message):
            model(ids, attention_mask=mask, past_key_values=cache)
        assert cache.get_seq_length() == 0
        model(random_tokens(3, 30), past_key_values=cache)
    beams = model.generate(
        ids,
        attention_mask=mask,
        num_beams=2,
        max_new_tokens=3,
        past_key_values=VLCache(model.config, 8, image_tokens=[(1, 4), (2, 9)]),
    )
    assert beams.shape == (2, 33)
