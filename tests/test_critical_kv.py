"""CriticalKV: what values weigh behind the output projection, and which tokens they keep, against loops."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from models import build_model, drive, random_rows, random_tokens, tiny_model
from peft import LoraConfig, get_peft_model
from reference import HoldingPolicy, best, compare_with_policies
from test_masked_dense import compare_with_masked_dense
from transformers import PreTrainedModel

from pyramid_cache import CriticalKVCache, CriticalPolicy, DefensiveKVCache, PolicyCache, SnapKVCache
from pyramid_cache.caches.h2o import H2OPolicy
from pyramid_cache.caches.scissorhands import ScissorhandsPolicy
from pyramid_cache.caches.snapkv import SnapKVPolicy
from pyramid_cache.caches.streaming_llm import StreamingLLMPolicy
from pyramid_cache.caches.tova import TOVAPolicy
from pyramid_cache.engine import projection
from pyramid_cache.engine.projection import projected_norms


# Forty generated tokens, and later turns that are longer than a window of four queries, as long, and shorter.
PIECES = [*[1] * 9, 7, *[1] * 10, 4, *[1] * 10, 3, *[1] * 11]
SETTINGS = {"budget": 14, "window_size": 4, "kernel_size": 3, "eviction_interval": 3}


# The choice.


@dataclass
class WeighedPolicy(HoldingPolicy):
    """
    Forward passes of so many tokens; a prompt and each later turn evict at their end, steps when three tokens wait.
    `worth` says what each token of each head is worth. Heads keep their own best, or the best of all.
    """

    model: PreTrainedModel
    heads_compete: bool
    pieces: list[int] = field(default_factory=lambda: PIECES)
    kept: int = 14
    window_size: int = 4
    kernel_size: int = 3
    interval: int = 3
    norms: dict[tuple[int, int, int], float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.num_new, end = {self.prompt_length - 1: self.prompt_length}, self.prompt_length - 1
        for piece in self.pieces:
            end += piece
            self.num_new[end] = piece

    def norm(self, head: int, position: int) -> float:
        """The mean of `‖v W_O‖₁` over the query heads of a KV head."""
        place = (self.layer, head, position)
        if place not in self.norms:
            weight, width = self.model.model.layers[self.layer].self_attn.o_proj.weight, self.value.shape[-1]
            group = self.query.shape[0] // self.value.shape[0]
            sums = []
            for query_head in range(head * group, head * group + group):
                columns = weight[:, query_head * width : (query_head + 1) * width].double()
                sums.append(sum(abs(float(row @ self.value[head, position].double())) for row in columns))
            self.norms[place] = sum(sums) / group
        return self.norms[place]

    def is_recent(self, position: int, token: int) -> bool:
        return token > position - min(self.window_size, self.kept // 2)

    def observe(self, position: int, held: list[list[int]]) -> None:
        """What a prompt or a later turn tells, which ends at `position`."""

    def worth(self, position: int, held: list[list[int]]) -> dict[tuple[int, int], float]:
        raise NotImplementedError

    def evict(self, position: int, held: list[list[int]], given: torch.Tensor) -> list[list[int]]:
        if position not in self.num_new:
            return held
        is_prompt, num_rows = position < self.prompt_length, min(self.num_new[position], self.window_size)
        rows = given[:, position + 1 - num_rows : position + 1].sum(dim=1) / self.window_size
        self.attention = rows if is_prompt else self.attention * (1 - num_rows / self.window_size) + rows
        num_waiting = self.interval - 1
        if self.num_new[position] > 1:
            self.observe(position, held)
            num_waiting = 0
        if sum(map(len, held)) <= len(held) * (self.kept + num_waiting):
            return held
        return self.best(self.worth(position, held), self.kept, len(held))

    def best(self, worth: dict[tuple[int, int], float], number: int, heads: int) -> list[list[int]]:
        """So many of each head, or `heads` times as many of all heads."""
        if not self.heads_compete:
            of_heads = [{token: worth[each, token] for each, token in worth if each == head} for head in range(heads)]
            return [best(scores, number) for scores in of_heads]
        order = sorted(worth, key=lambda place: (worth[place], place[1]), reverse=True)[: heads * number]
        return [sorted(token for each, token in order if each == head) for head in range(heads)]


@dataclass
class CriticalReference(WeighedPolicy):
    """Half by SnapKV's scores, the others by the product."""

    def worth(self, position: int, held: list[list[int]]) -> dict[tuple[int, int], float]:
        scores, reach = {}, self.kernel_size // 2
        for head, tokens in enumerate(held):
            given = [
                0.0 if self.is_recent(position, token) else float(self.attention[head, token]) for token in tokens
            ]
            for index, token in enumerate(tokens):
                mean = sum(given[max(index - reach, 0) : index + reach + 1]) / self.kernel_size
                scores[head, token] = math.inf if self.is_recent(position, token) else mean
        first = self.best(scores, self.kept // 2, len(held))
        return {
            (head, token): math.inf if token in first[head] else (score + 1e-4) * self.norm(head, token)
            for (head, token), score in scores.items()
        }


@pytest.mark.parametrize("ranking", ["head", "layer"])
def test_held_tokens_and_logits_are_those_of_the_reference(ranking: str) -> None:
    model, rows, later = tiny_model("llama"), random_rows((41, 26, 9), seed=3), random_tokens(3, sum(PIECES), seed=4)
    trace = drive(model, CriticalKVCache(model.config, **SETTINGS, ranking=ranking), rows, later, pieces=PIECES)
    policies = [CriticalReference(len(row), model, ranking == "layer") for row in rows]
    compare_with_policies(model, trace, rows, policies)


@pytest.mark.parametrize("ranking", ["head", "layer"])
def test_it_is_the_other_policy_if_the_first_part_is_all(ranking: str) -> None:
    model, rows, later = tiny_model("llama"), random_rows((41, 26), seed=5), random_tokens(2, 20, seed=6)
    wanted = PolicyCache(model.config, 14, SnapKVPolicy(4, 3), eviction_interval=3, ranking=ranking)
    caches = [wanted, CriticalKVCache(model.config, **SETTINGS, first_ratio=1.0, ranking=ranking)]
    traces = [drive(model, cache, rows, later) for cache in caches]
    for step, layer, row, head in torch.cartesian_prod(*map(torch.arange, (21, 3, 2, 2))).tolist():
        assert traces[0].held(step, layer, row, head) == traces[1].held(step, layer, row, head)
    assert set(SnapKVCache(model.config, 14).settings) < set(caches[1].settings)


@pytest.mark.parametrize("ranking", ["head", "layer", "model"])
def test_every_logit_equals_the_masked_run(ranking: str) -> None:
    model = tiny_model("llama")
    compare_with_masked_dense(model, CriticalKVCache(model.config, **SETTINGS, ranking=ranking), (23, 41), PIECES)


def test_another_policy_that_evicts_at_each_step() -> None:
    model = tiny_model("llama")
    cache = PolicyCache(model.config, 12, CriticalPolicy(H2OPolicy()), eviction_interval=1)
    compare_with_masked_dense(model, cache, (23, 41), PIECES)
    assert_weights_are_of_values(model, cache)


# The weights.


def slow_norms(projection: torch.nn.Module, value: torch.Tensor) -> list[float]:
    """Of each query head `‖v W_O‖₁`, by what the projection makes of the values `(kv_heads, value_dim)` of a token."""
    kv_heads, width = value.shape
    zeros = torch.zeros(projection.nf if hasattr(projection, "nf") else projection.in_features)
    num_in = projection.weight.shape[0] if hasattr(projection, "nf") else len(zeros)
    nothing, norms = torch.zeros(num_in), []
    for head in range(num_in // width):
        given = nothing.clone()
        given[head * width : (head + 1) * width] = value[head * kv_heads // (num_in // width)]
        norms.append(float((projection(given[None]) - projection(nothing[None])).double().abs().sum()))
    return norms


ATTENTIONS = {
    "llama": "model.layers.1.self_attn",
    "gpt2": "transformer.h.1.attn",
    "gpt_neox": "gpt_neox.layers.1.attention",
    "falcon": "transformer.h.1.self_attention",
    "opt": "model.decoder.layers.1.self_attn",
}
PROJECTIONS = {"llama": "o_proj", "gpt2": "c_proj", "gpt_neox": "dense", "falcon": "dense", "opt": "out_proj"}


@pytest.mark.parametrize("name", ATTENTIONS)
@torch.no_grad()
def test_norms_behind_the_output_projection_of(name: str) -> None:
    attention = build_model(name).get_submodule(ATTENTIONS[name])
    linear = getattr(attention, PROJECTIONS[name])
    num_in = linear.weight.shape[0] if name == "gpt2" else linear.in_features
    value = torch.randn(2, 2, 3, num_in // 4)
    norms = projected_norms(attention, value, 1)
    assert norms.shape == (2, 4, 3)
    for row, token in ((0, 0), (1, 2)):
        assert norms[row, :, token].tolist() == pytest.approx(slow_norms(linear, value[row, :, token]), rel=1e-4)


def test_an_adapter_counts_as_the_merged_weights() -> None:
    torch.manual_seed(0)
    adapted = get_peft_model(build_model("llama"), LoraConfig(r=4, lora_alpha=32, target_modules=["o_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    tokens, held = random_tokens(1, 40), []
    for model in (adapted, adapted.merge_and_unload()):
        cache = CriticalKVCache(model.config, **SETTINGS)
        model.generate(input_ids=tokens, past_key_values=cache, max_new_tokens=9, do_sample=False, eos_token_id=None)
        held.append([cache.positions(layer).sort().values for layer in range(3)])
    assert all(torch.equal(*pair) for pair in zip(*held, strict=True))


def assert_weights_are_of_values(model: PreTrainedModel, cache: PolicyCache) -> None:
    """What is remembered of each held token is the norm of the value that is held; nothing waits."""
    cache.compress()
    for index, layer in enumerate(cache.layers):
        store = layer.store._unpacked() if getattr(layer.store, "packed", None) else layer.store
        is_token = store.in_use("positions") >= 0
        norms = projected_norms(model.model.layers[index].self_attn, store.in_use("values"), 1)
        norms = norms.unflatten(1, (norms.shape[1] // 2, 2)).mean(dim=2)
        torch.testing.assert_close(store.in_use("value_weights")[is_token], norms[is_token], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("ranking", ["head", "layer"])
def test_each_token_has_the_weight_of_its_value(ranking: str) -> None:
    """After steps of other shapes, in other rows, and after steps of fixed shapes."""
    model = tiny_model("llama")
    cache = CriticalKVCache(model.config, **{**SETTINGS, "budget": 30}, ranking=ranking)
    model(random_tokens(2, 18), past_key_values=cache)
    for step in range(31):
        model(random_tokens(2, 1, seed=step + 1), past_key_values=cache)
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    cache.step()
    for step in range(7):
        model(random_tokens(3, 1, seed=step), past_key_values=cache)
        cache.step()
    cache.release()
    assert cache.num_kept_tokens() != [30] * 3
    assert_weights_are_of_values(model, cache)


# What cannot be.


@torch.no_grad()
def test_an_unknown_output_projection_is_refused_before_anything_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    cache = CriticalKVCache(model.config, **SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(projection, "NAMES", ("dense",))
        for _ in range(2):
            with pytest.raises(NotImplementedError, match="LlamaAttention has no output projection that is known"):
                model(random_tokens(1, 20), past_key_values=cache)
    model(random_tokens(1, 20), past_key_values=cache)
    assert cache.get_seq_length() == 20


def test_policies_that_cannot_be_weighed_are_refused() -> None:
    for policy, reason in ((TOVAPolicy(), "lets all heads share tokens"), (StreamingLLMPolicy(), "share|moves")):
        with pytest.raises(ValueError, match=f"{reason}.*SnapKVPolicy"):
            CriticalPolicy(policy)
    for settings in ({"inner": "snapkv"}, {"first_ratio": 1.5}, {"epsilon": -1.0}):
        with pytest.raises(ValueError, match=f"`{next(iter(settings))}="):
            CriticalPolicy(**{"inner": SnapKVPolicy(), **settings})


def test_policies_that_weigh_values_are_refused() -> None:
    config = tiny_model("llama").config
    for cache_class in (CriticalKVCache, DefensiveKVCache):
        with pytest.raises(ValueError, match=r"weighs values itself.*such as SnapKVPolicy"):
            CriticalPolicy(cache_class(config).policy)
    assert CriticalPolicy(ScissorhandsPolicy()).measure is not None
