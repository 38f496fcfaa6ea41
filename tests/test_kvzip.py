"""KVzip: the scores of a replay, what stays of a context, and that nothing of the replay does."""

import copy

import pytest
import torch
from models import build_model, left_pad, random_rows, random_tokens, tiny_model
from test_encoder_decoder import model_of
from test_masked_dense import compare_with_masked_dense
from text_tokenizers import byte_tokenizer
from transformers import DynamicCache, PreTrainedModel

from pyramid_cache import KVzipCache, KVzipPlusCache, PolicyCache, ReplayTexts
from pyramid_cache.caches.kvzip import NUM_SINK_TOKENS, KVzipPolicy
from pyramid_cache.engine.replay import NUM_LEADING_TOKENS


TEXTS = ReplayTexts((5, 6, 7), (5, 8), (9,))


@torch.no_grad()
def slow_scores(model: PreTrainedModel, context: torch.Tensor, chunk_size: int, is_plus: bool) -> list[torch.Tensor]:
    """
    For each layer `(kv_heads, tokens)`, from the attentions of one forward pass for each chunk. A softmax over some of
    the keys is that over all of them, divided by their share.
    """
    num_tokens, ids = len(context), context.tolist()
    inputs_of = [[] for _ in model.model.layers]
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, index=index: inputs_of[index].append(kwargs["hidden_states"][0]),
            with_kwargs=True,
        )
    scores: list[torch.Tensor] = []
    for start in range(0, num_tokens, chunk_size):
        chunk = ids[start : start + chunk_size]
        leading = ids[start - NUM_LEADING_TOKENS : start] if start else []
        replay = [*(TEXTS.later if start else TEXTS.first), *leading, *TEXTS.suffix, *chunk]
        dense = DynamicCache(config=model.config)
        output = model(torch.tensor([ids + replay]), past_key_values=dense, output_attentions=True)
        for index, probabilities in enumerate(output.attentions):
            kv_heads, num_chosen = dense.layers[index].keys.shape[1], len(chunk)
            group = probabilities.shape[1] // kv_heads
            found = torch.zeros(kv_heads, num_chosen)
            weight = model.model.layers[index].self_attn.o_proj.weight
            width = weight.shape[1] // probabilities.shape[1]
            for head, row, place in (
                (head, row, place)
                for head in range(probabilities.shape[1])
                for row in range(len(replay))
                for place in range(num_chosen)
            ):
                seen = probabilities[0, head, num_tokens + row]
                chosen = {*range(NUM_SINK_TOKENS), *range(start, start + num_chosen), *range(num_tokens, len(seen))}
                score = seen[start + place] / seen[sorted(chosen)].sum()
                if is_plus:
                    value = dense.layers[index].values[0, head // group, start + place]
                    score *= (weight[:, head * width : (head + 1) * width] @ value).norm()
                    score /= inputs_of[index][-1][num_tokens + row].norm()
                found[head // group, place] = max(found[head // group, place], score)
            if start:
                scores[index] = torch.cat([scores[index], found], dim=-1)
            else:
                scores.append(found)
    return scores


@pytest.mark.parametrize("cache_class", [KVzipCache, KVzipPlusCache])
def test_scores_are_those_of_a_replay(cache_class: type[KVzipCache], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of different length, in one chunk, and in chunks of which the shorter row has fewer."""
    model, rows = build_model("llama", attention="eager"), random_rows((13, 21), seed=3)
    input_ids, attention_mask = left_pad(rows)
    for chunk_size in (2048, 9):
        cache = cache_class(model, budget=0.9, texts=TEXTS, chunk_size=chunk_size, ranking="head")
        scores = []
        monkeypatch.setattr(cache.shared, "settle", lambda: scores.extend(layer.state for layer in cache.layers))  # noqa: B023
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            model(input_ids, attention_mask=attention_mask, position_ids=positions, past_key_values=cache)
        for row, context in enumerate(rows):
            wanted = slow_scores(build_model("llama", attention="eager"), context, chunk_size, cache.is_weighed)
            for state, expected in zip(scores, wanted, strict=True):
                torch.testing.assert_close(state.replayed[row, :, : len(context)], expected, atol=1e-5, rtol=1e-4)
                assert state.replayed[row, :, len(context) :].eq(0).all()


def test_the_best_of_all_layers_stay_and_the_replay_leaves_nothing() -> None:
    model, context = build_model("llama", attention="eager"), random_tokens(1, 30, seed=4)
    cache, whole = (KVzipCache(model, budget, texts=TEXTS) for budget in (10, 4096))
    logits = []
    for each in (cache, whole, DynamicCache(config=model.config)):
        with torch.no_grad():
            logits.append(model(context, past_key_values=each).logits)
        assert each.get_seq_length() == 30
    assert torch.equal(logits[0], logits[2]) and torch.equal(logits[1], logits[2])
    scores = slow_scores(build_model("llama", attention="eager"), context[0], 2048, False)
    for each in scores:
        each[:, :NUM_SINK_TOKENS] = torch.inf
    best = torch.cat([each.flatten() for each in scores]).sort(descending=True).values
    kv_heads, num_layers = len(scores[0]), len(scores)
    threshold = best[num_layers * 9 * kv_heads - 1]
    for index, each in enumerate(scores):
        share = int((each >= threshold).sum()) // kv_heads + 1
        kept = each.flatten().topk(share * kv_heads).indices.tolist()
        held = cache.positions(index)[0]
        assert sorted(place + head * 30 for head, row in enumerate(held.tolist()) for place in row if place >= 0) == (
            sorted(kept)
        )
    assert whole.num_kept_tokens() == [30] * num_layers


@pytest.mark.parametrize("ranking", ["head", "layer", "model"])
def test_what_it_holds_is_attended_to_and_nothing_else(ranking: str) -> None:
    """Answers, and later turns, which are replayed on their own; padded rows."""
    model = tiny_model("llama")
    for lengths, calls in (((23, 41, 32), [1] * 34), ((41, 41), [1, 9, 1, 13, 1])):
        cache = KVzipCache(model, 12, texts=TEXTS, chunk_size=16, ranking=ranking, eviction_interval=3)
        compare_with_masked_dense(model, cache, lengths, calls)
    assert sum(cache.num_kept_tokens()) <= 3 * (12 + 2)


def test_the_prefix_of_the_template_is_not_repeated() -> None:
    """What follows has the scores of a context behind it; of the prefix only the first tokens stay."""
    model, prefix = tiny_model("llama"), (11, 12, 13, 14, 15, 16)
    body = random_tokens(1, 24, seed=4)
    held = []
    for texts in (TEXTS, ReplayTexts(TEXTS.first, TEXTS.later, TEXTS.suffix, prefix)):
        cache = KVzipCache(model, 12, texts=texts, ranking="head")
        rows, mask = left_pad((torch.cat([torch.tensor(prefix), body[0]]), body[0]))
        with torch.no_grad():
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            model(rows, attention_mask=mask, position_ids=positions, past_key_values=cache)
        held.append([[{*slots} for slots in cache.positions(index)[0].tolist()] for index in range(3)])
        assert cache.num_kept_tokens() == [12] * 3
    assert all(slots & {*range(6)} == {0, 1, 2, 3} for heads in held[1] for slots in heads)
    assert any(slots & {4, 5} for heads in held[0] for slots in heads)


def test_generated_tokens_make_room_for_the_context() -> None:
    """The latest stay, half of the budget at most; older ones are the first to go."""
    model, context = tiny_model("llama"), random_tokens(1, 30)
    cache = KVzipCache(model, 12, texts=TEXTS, num_recent=4, ranking="head", eviction_interval=1)
    with torch.no_grad():
        for num_new in (30, *[1] * 20):
            model(random_tokens(1, num_new) if num_new == 1 else context, past_key_values=cache)
    cache.compress()
    for index in range(len(cache.layers)):
        for slots in cache.positions(index)[0].tolist():
            held = {place for place in slots if place >= 0}
            assert {0, 1, 2, 3, 46, 47, 48, 49} <= held and len(held) == 12
            assert all(place < 30 or place >= 46 for place in held)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "qwen3", "gpt_neox"])
def test_models_of_other_families(name: str) -> None:
    """Sliding-window layers, other names of the output projection, positions that are learned."""
    model = build_model(name)
    tokens = random_tokens(1, 30)
    answers = [
        model.generate(tokens, past_key_values=cache, max_new_tokens=4, do_sample=False, eos_token_id=None)
        for cache in (
            DynamicCache(config=model.config),
            KVzipPlusCache(model, 4096, texts=TEXTS),
            KVzipPlusCache(model, 12, texts=TEXTS, chunk_size=20),
        )
    ]
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0][:, :31], answers[2][:, :31])


def test_texts_come_from_a_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}> {{ message.content }} </s> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    texts = ReplayTexts.of(tokenizer)
    assert tokenizer.decode(texts.suffix) == " </s> <assistant> "
    assert tokenizer.decode(texts.first) == "\n\nRepeat the previous context exactly."
    assert tokenizer.decode(texts.prefix) == "<user> "
    tokenizer.chat_template = None
    assert ReplayTexts.of(tokenizer).suffix == () and ReplayTexts.of(tokenizer).first == texts.first


def test_bad_calls() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="give the model instead of its config"):
        KVzipCache(model.config, 12, texts=TEXTS)
    with pytest.raises(ValueError, match="Give `tokenizer=`, or the ids"):
        KVzipCache(model, 12)
    for texts in (5, ((1,),), ((1,), (2,), (3,), (4,), (5,)), (("a",), (), ()), (5, 6, 7), ((True,), (), ())):
        with pytest.raises(ValueError, match="must be a ReplayTexts, or its three or four sequences"):
            KVzipCache(model, 12, texts=texts)
    with pytest.raises(ValueError, match="outside of the 101 that the model has"):
        KVzipCache(model, 12, texts=((101,), (), ()))
    with pytest.raises(ValueError, match="`tokenizer=3` is no tokenizer"):
        KVzipCache(model, 12, tokenizer=3)
    with pytest.raises(ValueError, match='Give `ranking="model"`'):
        KVzipCache(model, 12, texts=TEXTS, ranking="model-online")
    cache = KVzipCache(model, 12, texts=TEXTS)
    with pytest.raises(NotImplementedError, match="embeddings"):
        model(inputs_embeds=torch.zeros(1, 9, model.config.hidden_size), past_key_values=cache)
    with pytest.raises(ValueError, match="built from another model"):
        build_model("llama")(random_tokens(1, 9), past_key_values=cache)
    assert cache.get_seq_length() == 0
    with pytest.raises(NotImplementedError, match="is an encoder-decoder"):
        KVzipCache(model_of("bart"), 12, texts=TEXTS)


def kept_positions(cache: KVzipCache) -> list[torch.Tensor]:
    return [cache.positions(index) for index in range(len(cache.layers))]


@torch.no_grad()
def test_a_prompt_of_one_token_is_read_again_as_well() -> None:
    """Else its layers would wait for ever, and evict twice at the next turn."""
    model, first, later = tiny_model("llama"), random_tokens(1, 1, seed=1), random_tokens(1, 40, seed=2)
    for ranking in ("head", "model"):
        cache = KVzipCache(model, 12, texts=TEXTS, ranking=ranking)
        model(first, past_key_values=cache)
        assert not cache.shared.waiting
        model(later, past_key_values=cache)
        assert sum(cache.num_kept_tokens()) <= 12 * len(cache.layers) and cache.get_seq_length() == 41


@torch.no_grad()
@pytest.mark.parametrize("where", ["replay", "norm"])
def test_a_replay_that_broke_off_is_made_up_for(where: str) -> None:
    """By whatever comes next: a step, a turn, `compress`, copies of rows."""
    model, prompt = build_model("llama"), random_tokens(1, 40, seed=3)
    whole = KVzipCache(model, 12, texts=TEXTS)
    model(prompt, past_key_values=whole)
    calls = {
        "step": lambda cache: model(random_tokens(1, 1), past_key_values=cache),
        "turn": lambda cache: model(random_tokens(1, 3), past_key_values=cache),
        "compress": lambda cache: cache.compress(),
        "repeat": lambda cache: cache.batch_repeat_interleave(2),
    }
    for name, call in calls.items():
        cache, count = KVzipCache(model, 12, texts=TEXTS), [0]

        def fail(*args: object, count: list[int] = count) -> None:
            count[0] += 1
            if where == "norm" or count[0] == 2:
                raise MemoryError

        hook = (model.model.norm if where == "norm" else model.model.layers[1]).register_forward_hook(fail)
        with pytest.raises(MemoryError):
            model(prompt, past_key_values=cache)
        hook.remove()
        call(cache)
        wanted = copy.deepcopy(whole)
        call(wanted)
        pairs = zip(kept_positions(cache), kept_positions(wanted), strict=True)
        assert all(torch.equal(*pair) for pair in pairs), name


@torch.no_grad()
def test_tokens_that_were_replayed_cannot_be_taken_back_without_a_trace() -> None:
    model = tiny_model("llama")
    cache = KVzipCache(model, 30, texts=TEXTS)
    model(random_tokens(1, 20), past_key_values=cache)
    cache.crop(-5)
    with pytest.raises(ValueError, match="crop"):
        model(random_tokens(1, 30, seed=9), past_key_values=cache)


@torch.no_grad()
def test_second_turns_with_an_interval_of_one() -> None:
    model = tiny_model("llama")
    cache = KVzipCache(model, 16, texts=TEXTS, ranking="head", eviction_interval=1)
    for turn in range(3):
        model(random_tokens(1, 40, seed=turn), past_key_values=cache)
        model(random_tokens(1, 1), past_key_values=cache)
        assert cache.num_kept_tokens() == [16] * len(cache.layers)


def test_its_policy_needs_a_replay() -> None:
    with pytest.raises(ValueError, match=r"second reading of the prompt, which PolicyCache does not do"):
        PolicyCache(tiny_model("llama").config, 12, KVzipPolicy())


@torch.no_grad()
def test_models_that_end_with_another_kind_of_layer() -> None:
    """The replay waits for it."""
    kinds = ["full_attention", "full_attention", "sliding_attention"]
    model, prompt = build_model("gemma3", layer_types=kinds), random_tokens(1, 40)
    cache = KVzipCache(model, 12, texts=TEXTS)
    model(prompt, past_key_values=cache)
    assert sum(cache.num_kept_tokens()) <= 2 * 12 and cache.get_seq_length() == 40
    large = KVzipCache(model, 100, texts=TEXTS)
    found, wanted = (model.generate(prompt, past_key_values=each, max_new_tokens=5) for each in (large, None))
    assert torch.equal(found, wanted)
