"""
Long streams: thousands of generated tokens on every bounded cache, step by step against a float64 stream of lists.

The reference is a Llama written out in numpy that shares nothing with the package or with transformers' attention: it
feeds itself one token at a time and keeps, per layer and key head, Python lists of what the policy holds. Compared are
the logits and the held positions of every step, and at checkpoints what the process and the cache hold.
"""

import gc
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from caches import CACHE_CASES, CacheCase, parametrize_cases
from models import build_model, left_pad, random_rows
from reference import HeldTokens, choose, score_of
from transformers import LlamaForCausalLM, LogitsProcessor

from pyramid_cache import H2OCache, PolicyCache, StreamingLLMCache
from pyramid_cache.caches.streaming_llm import REBASE_INTERVAL
from pyramid_cache.engine.cache import CompressedCache


every_bounded_cache = parametrize_cases(case for case in CACHE_CASES if case.is_bounded and not case.has_own_reference)

# What float32 costs in a forward of these models, whose logits reach 6.
LOGIT_TOLERANCE = 1e-4
# Two scores that float32 sums cannot tell apart, relative to their size.
SCORE_TOLERANCE = 1e-5


@dataclass
class HeldToken:
    """What the reference keeps of a token in one key head.

    Attributes:
        position: Its number in its row.
        key: `(head_dim,)` before rotation.
        value: `(head_dim,)`.
        score: All attention it was given so far, or the mean of what the last queries gave.
    """

    position: int
    key: np.ndarray
    value: np.ndarray
    score: float = 0.0


Head = list[HeldToken]


class StreamOfLists:
    """
    A Llama in float64 that is fed a row token by token and keeps what a policy keeps, in the order of arrival.

    Attributes:
        heads: `heads[layer][head]`, the tokens held.
        length: The tokens fed.
    """

    def __init__(self, model: LlamaForCausalLM, prompt_length: int) -> None:
        config = model.config
        self.weights = {name: weight.double().numpy() for name, weight in model.state_dict().items()}
        self.num_layers, self.num_groups = config.num_hidden_layers, config.num_key_value_heads
        self.head_dim, self.epsilon = config.head_dim, config.rms_norm_eps
        self.inv_freq = 1.0 / config.rope_parameters["rope_theta"] ** (np.arange(0, self.head_dim, 2) / self.head_dim)
        self.prompt_length = prompt_length
        self.heads: list[list[Head]] = [[[] for _ in range(self.num_groups)] for _ in range(self.num_layers)]
        self.length = 0

    # What a policy decides.

    def places(self, head: Head) -> np.ndarray:
        """The position that each held token is attended to at; the newest token, which attends, is the last."""
        raise NotImplementedError

    def visible(self, head: Head) -> Head:
        """What the newest token attends to."""
        return head

    @property
    def tolerance(self) -> float:
        """How far logits may be off."""
        return LOGIT_TOLERANCE

    def score(self, heads: list[Head], given: list[np.ndarray]) -> None:
        """Takes down what the newest token gave to what each head holds."""
        for head, amounts in zip(heads, given, strict=True):
            for token, amount in zip(head, amounts, strict=True):
                token.score += amount

    def evict(self, layer: int, index: int, head: Head) -> Head:
        """What stays when the newest token has attended."""
        raise NotImplementedError

    # The model.

    def feed(self, token: int) -> np.ndarray:
        """Take one more token in; returns the logits after it, `(vocabulary,)`."""
        self.length += 1
        hidden = self.weights["model.embed_tokens.weight"][token]
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            hidden = hidden + self._attention(layer, prefix, self._norm(hidden, prefix + "input_layernorm.weight"))
            inner = self._norm(hidden, prefix + "post_attention_layernorm.weight")
            gate = self._project(inner, prefix + "mlp.gate_proj")
            gate = gate / (1 + np.exp(-gate)) * self._project(inner, prefix + "mlp.up_proj")
            hidden = hidden + self._project(gate, prefix + "mlp.down_proj")
        return self._project(self._norm(hidden, "model.norm.weight"), "lm_head")

    def _attention(self, layer: int, prefix: str, hidden: np.ndarray) -> np.ndarray:
        query, key, value = (self._project(hidden, f"{prefix}self_attn.{name}_proj") for name in "qkv")
        queries = query.reshape(self.num_groups, -1, self.head_dim)
        keys, values = key.reshape(self.num_groups, -1), value.reshape(self.num_groups, -1)
        output, heads, given = np.empty_like(queries), [], []
        for index in range(self.num_groups):
            head = [*self.heads[layer][index], HeldToken(self.length - 1, keys[index], values[index])]
            seen = self.visible(head)
            places = self.places(seen)
            rotated = self._rotate(np.stack([token.key for token in seen]), places)
            logits = self._rotate(queries[index], places[-1:]) @ rotated.T / math.sqrt(self.head_dim)
            weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            output[index] = weights @ np.stack([token.value for token in seen])
            heads.append(head)
            given.append(weights.mean(axis=0))
        self.score(heads, given)
        self.heads[layer] = [self.evict(layer, index, head) for index, head in enumerate(heads)]
        return self._project(output.reshape(-1), prefix + "self_attn.o_proj")

    def _project(self, states: np.ndarray, name: str) -> np.ndarray:
        return self.weights[name + ".weight"] @ states

    def _norm(self, states: np.ndarray, name: str) -> np.ndarray:
        return self.weights[name] * states / np.sqrt((states * states).mean() + self.epsilon)

    def _rotate(self, states: np.ndarray, places: np.ndarray) -> np.ndarray:
        """States `(tokens, head_dim)` turned to places `(tokens or 1,)`."""
        return turn(states, places[:, None] * self.inv_freq)


class StreamingLLMStream(StreamOfLists):
    """The first tokens and a rolling window, at their places in the cache."""

    def __init__(self, model: LlamaForCausalLM, prompt_length: int, cache: StreamingLLMCache) -> None:
        super().__init__(model, prompt_length)
        layer = cache.layers[0]
        self.num_sinks, self.window = layer.num_sink_tokens, layer.window_length - layer.num_sink_tokens
        self.is_dense = layer.prefill == "dense"

    def places(self, head: Head) -> np.ndarray:
        return np.arange(len(head))

    def visible(self, head: Head) -> Head:
        return head if self.length <= self.prompt_length and self.is_dense else self._kept(head)

    @property
    def tolerance(self) -> float:
        # The model rotates by float32 angles, off by up to 6e-8 of the position; the cache starts anew before long.
        return LOGIT_TOLERANCE + (6e-7 * self.length if self.length <= REBASE_INTERVAL + 2 * self.window else 0.0)

    def score(self, heads: list[Head], given: list[np.ndarray]) -> None:
        """No score is kept."""

    def _kept(self, head: Head) -> Head:
        first = self.length - self.window
        return [token for token in head if token.position < self.num_sinks or token.position >= first]

    def evict(self, layer: int, index: int, head: Head) -> Head:
        is_read = self.length >= self.prompt_length or not self.is_dense
        return self._kept(head) if is_read else head


class H2OStream(StreamOfLists):
    """
    The keys that gathered most attention and the most recent ones.

    float32 sums cannot order scores that are nearly the same. Where the cache evicted another token than the reference,
    of the same score within rounding, the reference goes along; `num_ties` counts how often.
    """

    def __init__(self, model: LlamaForCausalLM, prompt_length: int, cache: H2OCache, row: int) -> None:
        super().__init__(model, prompt_length)
        self.cache, self.row = cache, row
        self.model_inv_freq = model.model.rotary_emb.inv_freq.numpy()
        self.budget = int(cache.layers[0].budget.amount)
        self.num_recent = self.budget - int(self.budget * cache.layers[0].heavy_ratio)
        self.num_ties = 0

    def places(self, head: Head) -> np.ndarray:
        return np.array([token.position for token in head])

    def _rotate(self, states: np.ndarray, places: np.ndarray) -> np.ndarray:
        # Keys stay where the model put them, by float32 angles: that is the model's rounding, not the cache's.
        return turn(states, (places[:, None].astype(np.float32) * self.model_inv_freq).astype(np.float64))

    def evict(self, layer: int, index: int, head: Head) -> Head:
        if self.length < self.prompt_length:
            return head
        others = [token for token in head if token.position < self.length - self.num_recent]
        recent = head[len(others) :]
        ranked = sorted(others, key=lambda token: (token.score, token.position))
        num_lost = max(len(head) - self.budget, 0)
        lost = {token.position for token in ranked[:num_lost]}
        held = set(held_positions(self.cache, layer, self.row, index))
        if self.length > self.prompt_length and num_lost == 1 and lost & held:
            # The other choice must be as good, else the comparison of positions fails.
            choice = [token for token in others if token.position not in held]
            if len(choice) == 1 and math.isclose(choice[0].score, ranked[0].score, rel_tol=SCORE_TOLERANCE):
                lost = {choice[0].position}
                self.num_ties += 1
        return [token for token in others if token.position not in lost] + recent


class ScoredStream(StreamOfLists):
    """
    What a score ranks highest: of a prompt at once, of generated tokens when as many have come as may wait.

    Where scores are the same within rounding, the reference goes along with the cache.
    """

    def __init__(
        self, model: LlamaForCausalLM, prompt_length: int, cache: PolicyCache, row: int, case: CacheCase
    ) -> None:
        super().__init__(model, prompt_length)
        self.cache, self.row = cache, row
        self.model_inv_freq = model.model.rotary_emb.inv_freq.numpy()
        self.method = score_of(case.cache_class, case.tight)
        self.num_waiting = case.tight["eviction_interval"] - 1
        budget = cache.compressed_layers[0].budget
        self.kept = [
            cache.policy.num_tokens(prompt_length, budget, layer, self.num_layers) for layer in range(self.num_layers)
        ]

    places = H2OStream.places
    _rotate = H2OStream._rotate

    def score(self, heads: list[Head], given: list[np.ndarray]) -> None:
        window = self.method.window_size
        if not window or self.length <= self.prompt_length - window:
            return
        if self.method.heads_share_tokens:
            given = [np.mean(given, axis=0)] * len(given)
        for head, amounts in zip(heads, given, strict=True):
            for token, amount in zip(head, amounts, strict=True):
                share_left = 1.0 if self.length <= self.prompt_length else 1 - 1 / window
                token.score = share_left * token.score + amount / window

    def evict(self, layer: int, index: int, head: Head) -> Head:
        most = self.kept[layer] + (self.num_waiting if self.length > self.prompt_length else 0)
        if self.length < self.prompt_length or len(head) <= most:
            return head
        tokens = HeldTokens(
            [token.position for token in head],
            self._rotate(np.stack([token.key for token in head]), self.places(head)),
            np.stack([token.value for token in head]),
            [token.score for token in head],
            self.length,
            self.kept[layer],
        )
        scores = dict(zip(tokens.positions, self.method.scores(tokens), strict=True))
        observed = set(held_positions(self.cache, layer, self.row, index))
        kept = choose(scores, self.kept[layer], observed, self.method.has_exact_ties, self.method.tie)
        return [token for token in head if token.position in kept]


def turn(states: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """States `(tokens, head_dim)` turned by angles `(tokens or 1, head_dim / 2)`."""
    cosine, sine, half = np.cos(angles), np.sin(angles), angles.shape[-1]
    first, second = states[:, :half], states[:, half:]
    turned = np.empty_like(states)
    turned[:, :half] = first * cosine - second * sine
    turned[:, half:] = second * cosine + first * sine
    return turned


def held_positions(cache: CompressedCache, layer: int, row: int, head: int) -> list[int]:
    """What a head of a row of the cache holds, in rising order."""
    return sorted(position for position in cache.positions(layer)[row, head].tolist() if position >= 0)


def build_stream(
    model: LlamaForCausalLM, case: CacheCase, cache: CompressedCache, prompt_length: int, row: int
) -> StreamOfLists:
    """The reference of a bounded cache."""
    if isinstance(cache, PolicyCache):
        return ScoredStream(model, prompt_length, cache, row, case)
    if isinstance(cache, H2OCache):
        return H2OStream(model, prompt_length, cache, row)
    return StreamingLLMStream(model, prompt_length, cache)


class Watch(LogitsProcessor):
    """Follows `generate` step by step: compares each step with the reference, and measures at checkpoints.

    Attributes:
        measured: At each checkpoint: bytes of the cache, number of living tensors, bytes of the process.
    """

    def __init__(
        self, cache: CompressedCache, streams: list[StreamOfLists], rows: list[torch.Tensor], checkpoints: list[int]
    ) -> None:
        self.cache, self.streams, self.checkpoints = cache, streams, checkpoints
        self.prompts = [row.tolist() for row in rows]
        self.num_steps = 0
        self.measured: list[tuple[int, int, int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Called by `generate` with the logits after each forward."""
        held = [self.cache.positions(layer).sort().values.tolist() for layer in range(len(self.cache.layers))]
        for row, stream in enumerate(self.streams):
            tokens = self.prompts[row] if self.num_steps == 0 else [int(input_ids[row, -1])]
            wanted = [stream.feed(token) for token in tokens][-1]
            error = np.abs(scores[row].double().numpy() - wanted).max()
            assert error < stream.tolerance, f"step {self.num_steps}, row {row}"  # False for NaN too
            for layer, heads in enumerate(stream.heads):
                for index, head in enumerate(heads):
                    positions = [position for position in held[layer][row][index] if position >= 0]
                    assert positions == [token.position for token in head], (
                        f"step {self.num_steps}, layer {layer}, row {row}, head {index}"
                    )
        self.num_steps += 1
        if self.num_steps in self.checkpoints:
            self.measured.append((self.cache.nbytes, count_tensors(), resident_bytes()))
        return scores


def count_tensors() -> int:
    """Living tensors of the whole process."""
    gc.collect()
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())


def resident_bytes() -> int:
    """Memory of the process; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def soak(case: CacheCase, lengths: tuple[int, ...], checkpoints: list[int]) -> Watch:
    """Sample until the last checkpoint with a tight cache, compared at every step and measured at the checkpoints."""
    model = build_model("llama", num_hidden_layers=2, max_position_embeddings=1 << 15)
    rows, cache = random_rows(lengths, seed=29), case.build(model)
    streams = [build_stream(model, case, cache, len(row), index) for index, row in enumerate(rows)]
    watch = Watch(cache, streams, rows, checkpoints)
    input_ids, attention_mask = left_pad(rows)
    model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        past_key_values=cache,
        max_new_tokens=checkpoints[-1],
        do_sample=True,
        logits_processor=[watch],
    )
    assert watch.num_steps == checkpoints[-1]
    assert cache.get_seq_length() == max(lengths) + checkpoints[-1] - 1
    return watch


def check_flat(watch: Watch, resident_growth: int) -> None:
    """Nothing has grown between the first checkpoint and the last, but for the tokens and the mask that `generate` keeps."""
    held_bytes, num_tensors, resident = zip(*watch.measured, strict=True)
    assert held_bytes[0] > 0 and len(set(held_bytes)) == 1
    assert max(num_tensors) == num_tensors[0]  # of all tests that run in this process, so that there may be fewer
    assert resident[-1] - resident[0] <= resident_growth


@every_bounded_cache
def test_1500_tokens(case: CacheCase) -> None:
    """A padded batch, in which one row is longer than the budget and one fills it while generating."""
    watch = soak(case, (23, 9), [200, 800, 1_500])
    check_flat(watch, resident_growth=8 << 20)


# What policies have in common shows within 1,500 tokens of each of them.
@pytest.mark.slow
@parametrize_cases(case for case in CACHE_CASES if case.is_bounded and not issubclass(case.cache_class, PolicyCache))
def test_20000_tokens(case: CacheCase) -> None:
    watch = soak(case, (40,), [1_000, 5_000, 20_000])
    check_flat(watch, resident_growth=8 << 20)
