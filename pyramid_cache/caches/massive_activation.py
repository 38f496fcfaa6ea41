"""
Tokens with massive activations always stay. A profile of the model can decide how many tokens each layer keeps.

A few tokens with massive activations (Sun et al., 2024, https://arxiv.org/abs/2402.17762) carry no content, and yet a
model without them fails: they take the attention that has nowhere else to go. `pyramid_cache.engine.massive` finds
them wherever they are, instead of taking the first tokens. Layers differ as well: some attend to half of the text,
some to a few tokens (layered sparsity, after Zhang et al., 2024,
https://blogs.novita.ai/how-kv-sparsity-achieves-1-5x-acceleration-for-vllm and
https://github.com/vllm-project/vllm/issues/10942). Each KV head keeps the massive tokens, the latest tokens, and those
with most attention, weighed by the norm of their value (VATP, https://arxiv.org/abs/2406.12335).

Departures from these sources: budgets are equal, or follow the attention of a profile. A token's score is its own
attention and the average over its neighbours, so that facts stay whole. SmolLM2-135M-Instruct answers 0.85, 0.82 and
0.06 of eight numbers in 1,024 tokens at budgets of 0.5, 0.25 and 0.1, with the question in view (80 questions).
SnapKVCache answers 0.38, 0.25 and 0.03. The recall model finds 0.77, 0.45 and 0.17 of its pairs, against 0.68, 0.32
and 0.13 (docs/quality.md).
"""

import os
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pyramid_cache.engine.arguments import check_decoder_config
from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.budget import MAX_TOKENS, read_count, read_kernel_size, support_schedule
from pyramid_cache.engine.cache import config_and_model
from pyramid_cache.engine.massive import (
    MAX_MASSIVE_TOKENS,
    NUM_FIRST_TOKENS,
    MassiveTemplate,
    MassiveTokens,
    massive_in_hidden_states,
    massive_in_keys_and_values,
    median_magnitude,
)
from pyramid_cache.engine.outputs import OutputProbes
from pyramid_cache.engine.policy import Policy, ScoringView
from pyramid_cache.engine.policy_cache import DEFAULT_EVICTION_INTERVAL, PolicyCache, PolicyLayer
from pyramid_cache.engine.profile import Profile, read_profile
from pyramid_cache.engine.rope import SharedFrequencies, refuse_unsupported_rope
from pyramid_cache.engine.selection import gather_tokens
from pyramid_cache.engine.tokens import Tokens


# What a layer gets beside its window and its massive tokens, if the budget has as much.
LEAST_OTHERS = 64


@dataclass(frozen=True)
class MassiveToken:
    """
    A token that a layer never evicts.

    Attributes:
        position (`int`): Its rank among the tokens of its row.
        reason (`str`): "keys and values" if it looks massive to this layer, "hidden states" if it is by definition at
            the output of a layer below, or "first tokens" where nothing looks massive to this layer.
        value_ratio (`float`, *optional*): Its value norm over the median, where keys and values told it.
        cosine (`float`, *optional*): Of its un-rotated key and the template, where keys and values told it.
    """

    position: int
    reason: str
    value_ratio: float | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class MassiveActivationPolicy(Policy):
    """
    A token is worth the attention of the last queries to it and to the passage around it, times the norm of its value.
    See `MassiveActivationCache` for the fields.
    """

    profile: str | None = None
    window_size: int = 64
    kernel_size: int = 13

    def __post_init__(self) -> None:
        object.__setattr__(self, "window_size", read_count("window_size", self.window_size, least=1))
        object.__setattr__(self, "kernel_size", read_kernel_size(self.kernel_size))

    def score(self, view: ScoringView) -> torch.Tensor:
        is_recent = view.is_recent(self.window_size)
        # The window looks at itself most: its neighbours would be kept for that alone.
        attention = view.attention.masked_fill(is_recent, 0)
        attention = attention + view.pool(attention, self.kernel_size)
        # Not infinity: where the budget does not hold both, massive tokens come before recent ones.
        highest = torch.finfo(torch.float32).max
        norms = torch.linalg.vector_norm(view.value, ord=1, dim=-1, dtype=torch.float32)
        return (attention * norms).masked_fill(is_recent, highest)


class MassiveActivationLayer(PolicyLayer):
    """One layer of `MassiveActivationCache`."""

    row_tensors = (
        *PolicyLayer.row_tensors,
        "found_positions",
        "found_ratios",
        "found_cosines",
        "template_key",
        "template_norm",
        "exact_positions",
        "exact_median",
    )
    row_counts = (*PolicyLayer.row_counts, "row_looked")
    # What looks massive to this layer: `(batch, 8)`, see `MassiveTokens`. What later tokens are compared with:
    # `(batch, kv_heads, head_dim)` and `(batch, kv_heads)`, see `MassiveTemplate`.
    found_positions: torch.Tensor | None
    found_ratios: torch.Tensor | None
    found_cosines: torch.Tensor | None
    template_key: torch.Tensor | None
    template_norm: torch.Tensor | None
    # What is massive in the output of this layer, `(batch, 8)` int32, -1 for none; the median of a prompt, `(batch,)`.
    exact_positions: torch.Tensor | None
    exact_median: torch.Tensor | None

    # Set by the cache: the layers below this one, from the first on, the profile by which all of them share the
    # budget, and whether the output of this layer is looked at.
    below: tuple["MassiveActivationLayer", ...] = ()
    profile: Profile | None = None
    is_probed = False

    def _clear(self) -> None:
        super()._clear()
        self.row_looked: list[int] = []  # tokens that have been looked at
        self._new_positions: torch.Tensor | None = None

    def num_tokens_to_keep(self, row_length: int) -> int:
        mean = self.token_budget.num_tokens(row_length)
        if mean >= row_length or self.profile is None:  # a short prompt may grow up to the budget
            return mean
        supports = self.profile.supports
        minimum = self.policy.window_size + MAX_MASSIVE_TOKENS + LEAST_OTHERS
        return support_schedule(row_length, mean * len(supports), supports, minimum)[self.place.depth]

    # Which tokens never go.

    def _attend_and_observe(
        self, call: AttentionCall, tokens: Tokens
    ) -> tuple[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor | None]:
        output, attention = super()._attend_and_observe(call, tokens)
        self._look(call.key, call.value, tokens.positions)
        return output, attention

    def _priority(
        self, key: torch.Tensor, value: torch.Tensor, attention: torch.Tensor | None, positions: torch.Tensor
    ) -> torch.Tensor:
        self._look(key, value, positions)
        priority = super()._priority(key, value, attention, positions)
        return priority.masked_fill(self._is_massive(positions), float("inf"))

    def _is_massive(self, positions: torch.Tensor) -> torch.Tensor:
        """`(batch, kv_heads or 1, tokens)` bool: the tokens that never go, given their positions."""
        finds_nothing = self.found_positions[:, :1, None] < 0
        is_massive = finds_nothing & (positions < NUM_FIRST_TOKENS)
        for position in torch.cat([self.found_positions, self._known_positions()], dim=1).unbind(dim=1):
            is_massive |= positions == position[:, None, None]
        return is_massive & (positions >= 0)

    def _known_positions(self) -> torch.Tensor:
        """`(batch, any)` int32: what is massive in the outputs of layers below, -1 for none."""
        exact = [layer.exact_positions.to(self.device) for layer in self.below if layer.exact_positions is not None]
        return torch.cat([self.found_positions[:, :0], *exact], dim=1)

    @torch.no_grad()
    def _look(self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor) -> None:
        """Looks for massive tokens among those that have come since the last look, which all heads still hold."""
        looked = self.row_looked or [0] * self.batch_size
        num_new = max(length - before for length, before in zip(self.row_lengths, looked, strict=True))
        module = None if self._module is None else self._module()
        if not num_new or module is None:
            return
        if any(looked) or not self.columns_ascend:
            latest = positions.argsort(dim=-1)[..., -num_new:]
            key, value, positions = (gather_tokens(tensor, latest) for tensor in (key, value, positions))
        positions = positions[:, :1].masked_fill(positions[:, :1] < self.per_row(looked), -1)
        template = None if self.template_key is None else MassiveTemplate(self.template_key, self.template_norm)
        longest = max(self.row_lengths) if self.replayed is None else self.replayed.longest
        with torch.autocast(self.device.type, enabled=False):
            rotary = self.rotary_of(module)
            found, template = massive_in_keys_and_values(key, value, positions, rotary, longest, template)
        earlier = MassiveTokens.none(self.batch_size, self.device)
        if self.found_positions is not None:
            earlier = MassiveTokens(self.found_positions, self.found_ratios, self.found_cosines)
        self.found_positions, self.found_ratios, self.found_cosines = earlier.and_later(found)
        self.template_key, self.template_norm = template
        self.row_looked = list(self.row_lengths)

    # Hidden states.

    def _take_in(self, seen: Tokens, num_new: int) -> Tokens:
        if self.is_probed and self.replayed is None:  # what was recorded has no hidden states to come
            self._new_positions = seen.positions[:, 0, -num_new:]
        return super()._take_in(seen, num_new)

    @torch.no_grad()
    def observe_output(self, hidden_states: torch.Tensor) -> None:
        """
        Notes what is massive in `(batch, tokens, hidden_size)` hidden states, those of the tokens that came last.
        """
        positions, self._new_positions = self._new_positions, None
        # Tokens that may be taken back are left to keys and values, which are looked at when it is known that they
        # stay.
        if self.budget.is_unlimited or self.record_past or not self.is_initialized:
            return
        if positions is None:
            positions = self.next_position[:, 0] - 1
        hidden_states = hidden_states.to(self.device)
        is_token = positions >= 0
        if self.exact_median is None:
            self.exact_median = torch.full_like(is_token[:, 0], float("nan"), dtype=torch.float32)
        if hidden_states.shape[1] > 1:
            median = median_magnitude(hidden_states, is_token)
            self.exact_median = torch.where(self.exact_median.isnan(), median, self.exact_median)
        is_massive = massive_in_hidden_states(hidden_states, self.exact_median, is_token)
        positions = positions.masked_fill(~is_massive, -1)
        if self.exact_positions is not None:
            positions = torch.cat([self.exact_positions, positions], dim=1)
        self.exact_positions = first_positions(positions)

    # What users ask, and files.

    def massive_tokens(self) -> list[list[MassiveToken]]:
        """The tokens of each row that never go."""
        if self.found_positions is None:
            return [[] for _ in self.row_lengths]
        tensors = (self.found_positions, self.found_ratios, self.found_cosines, self._known_positions())
        rows = []
        for length, *row in zip(self.row_lengths, *(tensor.tolist() for tensor in tensors), strict=True):
            found, ratios, cosines, known = row
            tokens = [
                MassiveToken(position, "keys and values", ratio, cosine)
                for position, ratio, cosine in zip(found, ratios, cosines, strict=True)
            ]
            tokens += [MassiveToken(position, "hidden states") for position in sorted(set(known) - set(found))]
            first = range(NUM_FIRST_TOKENS if found[0] < 0 else 0)
            tokens += [MassiveToken(position, "first tokens") for position in first if position not in known]
            rows.append([token for token in tokens if 0 <= token.position < length])
        return rows

    def export_state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Looks first: the module that tells how keys were rotated is not there when the file is read."""
        if not self.budget.is_unlimited:
            positions = self.column_tokens.positions if self.positions is None else self.positions[..., : self.length]
            self._look(self.keys[:, :, : self.length], self.values[:, :, : self.length], positions)
        return super().export_state()


class MassiveActivationCache(PolicyCache):
    """
    Keeps the tokens with massive activations (https://arxiv.org/abs/2402.17762), the most recent ones, and per KV head
    those with most attention. With a profile, layers whose attention is spread keep more than others.

    The layers hold `budget` tokens on average and up to `eviction_interval` more each, however much is generated:
    `layers * batch * kv_heads * (budget + eviction_interval) * (2 * head_dim * itemsize + 8)` bytes. The prompt is
    read with full attention, so the first new token is exact.

    All layers keep the same number by default, which lost least in measured texts. docs/massive-activations.md says
    how they share the budget by a profile.

    Keys and values tell massive tokens, in the prompt and among generated tokens. With a model instead of its config,
    hidden states tell them too: at the outputs of layer 2 and of the layers at a quarter and half of the depth. With a
    profile, only the first layer with massive activations in its output is read. The layers above keep these tokens.

    Args:
        config (`PreTrainedConfig` or `PreTrainedModel`): The config of the model, or the model itself. With the model,
            hidden states of two or three layers are read, which takes more time.
        budget (`float`, `int` or `str`, defaults to 0.2): What layers keep on average: a fraction of the prompt, a
            number of tokens, or bytes for all layers that evict ("256MiB"). In later turns, a fraction is of all
            tokens seen. 1.0 never evicts.
        profile (`str`, *optional*): A file of `pyramid-cache profile`, by which layers share the budget.
        window_size (`int`, defaults to 64): How many of the last queries choose. As many of the last tokens always
            stay, but no more than half of what a layer keeps. Each generated token takes over `1 / window_size` of
            that attention.
        kernel_size (`int`, defaults to 13): Over how many neighbouring tokens attention is averaged. Odd. Larger
            values keep fewer and longer passages; 1 scores each token alone.
        eviction_interval (`int`, defaults to 32): How many generated tokens arrive before as many are evicted. Larger
            values take more memory and less time.

    Raises:
        ValueError: For an argument outside these ranges, a profile of another model, or a model that cannot be
            compressed.
        NotImplementedError: For a model whose rotary embedding depends on the length (dynamic NTK) or has several
            axes. It is raised at the first forward pass where the config does not tell.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import MassiveActivationCache
    >>> import torch

    >>> config = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
    >>> model = LlamaForCausalLM(config)
    >>> cache = MassiveActivationCache(model.config, budget=16, window_size=8)
    >>> tokens = model.generate(torch.arange(40)[None], past_key_values=cache, max_new_tokens=8, eos_token_id=None)
    >>> cache.compress()
    >>> sum(cache.num_kept_tokens()) <= 2 * 16
    True
    >>> [(token.position, token.reason) for token in cache.massive_tokens()[0][0]]
    [(0, 'first tokens'), (1, 'first tokens'), (2, 'first tokens'), (3, 'first tokens')]

    ```
    """

    layer_class = MassiveActivationLayer

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        budget: float | int | str = 0.2,
        *,
        profile: str | os.PathLike[str] | None = None,
        window_size: int = 64,
        kernel_size: int = 13,
        eviction_interval: int = DEFAULT_EVICTION_INTERVAL,
    ) -> None:
        config, model = config_and_model(config)
        check_decoder_config(config)
        refuse_unsupported_rope(config)
        if profile is not None and not isinstance(profile, (str, os.PathLike)):
            raise ValueError(f"`profile={profile!r}` must be the path of a file that `pyramid-cache profile` wrote.")
        path = None if profile is None else os.fspath(profile)
        policy = MassiveActivationPolicy(path, window_size, kernel_size)
        super().__init__(config, budget, policy, eviction_interval=eviction_interval)
        layers, self.output_probes = self.compressed_layers, None
        indices = [layer.place.layer_idx for layer in layers]
        read = None if path is None else read_profile(path, config, indices)
        if model is not None:
            self.frequencies = SharedFrequencies(config, weakref.ref(model))
            wanted = probed_layers(len(self.layers), read)
            # The next layers that evict; nothing is above the last one.
            probed = sorted({above[0] for least in wanted if (above := [i for i in indices[:-1] if i >= least])})
            self.output_probes = OutputProbes(model, probed)
            for index in probed:
                self.layers[index].is_probed = True
        for depth, layer in enumerate(layers):
            layer.below, layer.profile, layer.frequencies = tuple(layers[:depth]), read, self.frequencies

    def observe_output(self, layer_idx: int, hidden_states: torch.Tensor) -> None:
        """Shows a layer its decoder layer's output; called by the hook of `OutputProbes`."""
        self.layers[layer_idx].observe_output(hidden_states)

    def massive_tokens(self) -> dict[int, list[list[MassiveToken]]]:
        """
        The tokens that never go, and why. A layer that keeps fewer tokens than these loses the oldest of them.

        Returns:
            `dict[int, list[list[MassiveToken]]]`: By the index of each layer that evicts, for each row.
        """
        return {layer.place.layer_idx: layer.massive_tokens() for layer in self.compressed_layers}


def probed_layers(num_layers: int, profile: Profile | None) -> list[int]:
    """
    The decoder layers whose outputs are looked at. Massive activations appear in layer 1 or 2 of Llama and Mistral and
    in layer 11 of SmolLM2's 30, and stay until the last layers.
    """
    if profile is not None and profile.first_massive_layer is not None:
        return [profile.first_massive_layer]
    return sorted({min(2, num_layers - 1), num_layers // 4, num_layers // 2})


def first_positions(positions: torch.Tensor) -> torch.Tensor:
    """
    The 8 lowest of different positions `(batch, any)` int32, -1 for none.

    Returns:
        `torch.Tensor`: `(batch, 8)` int32, -1 behind the last.
    """
    missing = max(MAX_MASSIVE_TOKENS - positions.shape[1], 0)
    positions = torch.nn.functional.pad(positions, (0, missing), value=-1)
    positions = positions.masked_fill(positions < 0, MAX_TOKENS).sort(dim=1).values[:, :MAX_MASSIVE_TOKENS]
    return positions.masked_fill(positions == MAX_TOKENS, -1)
