"""
Tokens with massive activations always stay.

A few tokens with massive activations (Sun et al., 2024, https://arxiv.org/abs/2402.17762) carry no content, and yet a
model without them fails: they take the attention that has nowhere else to go. `detection` finds them wherever they
are, instead of taking the first tokens. Each KV head keeps the massive tokens, the latest tokens, and those with most
attention, weighed by the norm of their value (VATP, https://arxiv.org/abs/2406.12335).

Departure from these sources: a token's score is its own attention and the average over its neighbours, so that facts
stay whole (docs/quality.md). All layers keep the same number of tokens: shares by how widely a layer attends (layered
sparsity, https://github.com/vllm-project/vllm/issues/10942) lost facts at a half, and changed nothing at a quarter.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import Unpack

from pyramid_cache.caches.massive_activation import detection
from pyramid_cache.caches.snapkv import SnapKVPolicy
from pyramid_cache.engine.policy import LayerView, ScoringView, kernel_setting
from pyramid_cache.engine.policy_cache import EvictionOptions, PolicyCache
from pyramid_cache.engine.selection import gather_tokens
from pyramid_cache.engine.state import LayerState, counts, row
from pyramid_cache.ops.transfer import numbers_on


@dataclass(frozen=True)
class MassiveToken:
    """
    A token that a layer never evicts.

    Attributes:
        position (`int`): Its rank among the tokens of its row.
        reason (`str`): "keys and values" if it looks massive to this layer, "first tokens" where nothing does.
        value_ratio (`float`, *optional*): Its value norm over the median, if it looks massive.
        cosine (`float`, *optional*): Of its un-rotated key and the template, if it looks massive.
    """

    position: int
    reason: str
    value_ratio: float | None = None
    cosine: float | None = None


@dataclass(eq=False)
class MassiveState(LayerState):
    """
    Attributes:
        found_positions, found_ratios, found_cosines (`torch.Tensor`): `(batch, 8)`, what looks massive to this layer;
            see `MassiveTokens`.
        template_key, template_norm (`torch.Tensor`): `(batch, kv_heads, head_dim)` and `(batch, kv_heads)`, what later
            tokens are compared with; see `massive_in_keys_and_values`.
        row_looked (`list[int]`): How many tokens of each row have been looked at.
    """

    found_positions: torch.Tensor | None = row()
    found_ratios: torch.Tensor | None = row()
    found_cosines: torch.Tensor | None = row()
    template_key: torch.Tensor | None = row()
    template_norm: torch.Tensor | None = row()
    row_looked: list[int] = counts()


@dataclass(frozen=True)
class MassiveActivationPolicy(SnapKVPolicy):
    """
    SnapKV's window. A token is worth the attention of the last queries to it and to the passage around it, times the
    norm of its value. Massive tokens never go. See `MassiveActivationCache` for the fields.
    """

    kernel_size: int = kernel_setting(13)

    state_class = MassiveState
    needs_rotary = reads_counts = True

    def score(self, view: ScoringView) -> torch.Tensor:
        self.observe(view)
        is_recent = view.is_recent(self.window_size)
        # The window looks at itself most: its neighbours would be kept for that alone.
        attention = view.attention.masked_fill(is_recent, 0)
        attention = attention + view.pool(attention, self.kernel_size)
        # Not infinity: where the budget does not hold both, massive tokens come before recent ones.
        highest = torch.finfo(torch.float32).max
        norms = view.value.to(torch.promote_types(view.value.dtype, torch.float32)).norm(p=1, dim=-1).float()
        scores = (attention * norms).masked_fill(is_recent, highest)
        return scores.masked_fill(self.is_massive(view), float("inf"))

    def is_massive(self, view: ScoringView) -> torch.Tensor:
        """`(batch, kv_heads or 1, tokens)` bool: the tokens that never go."""
        found = view.state.found_positions
        is_massive = (found[:, :1, None] < 0) & view.is_first(detection.NUM_FIRST_TOKENS)
        for position in found.unbind(dim=1):
            is_massive |= view.positions == position[:, None, None]
        return is_massive & view.is_token

    def observe(self, prompt: LayerView) -> None:
        """Looks for massive tokens among those that have come since the last look, which all heads still hold."""
        state, key, value, positions = prompt.state, prompt.key, prompt.value, prompt.positions
        looked = state.row_looked or [0] * len(state.row_lengths)
        num_new = max(length - before for length, before in zip(state.row_lengths, looked, strict=True))
        if num_new <= 0:
            return
        if any(looked) or not state.columns_ascend:
            latest = positions.argsort(dim=-1)[..., -num_new:]
            key, value, positions = (gather_tokens(tensor, latest) for tensor in (key, value, positions))
        before = numbers_on(key.device, looked, torch.int32).view(-1, 1, 1)
        new = key, value, positions[:, :1].masked_fill(positions[:, :1] < before, -1)
        template = None if state.template_key is None else (state.template_key, state.template_norm)
        found, template = detection.massive_in_keys_and_values(
            *new, prompt.rotary, prompt.longest, template, lambda tensor: prompt.mean_over_heads(tensor)[:, 0]
        )
        if state.found_positions is not None:
            earlier = state.found_positions, state.found_ratios, state.found_cosines
            found = detection.MassiveTokens(*earlier).and_later(found)
        names = "found_positions", "found_ratios", "found_cosines", "template_key", "template_norm"
        for name, tensor in zip(names, (*found, *template), strict=True):
            state.put(name, tensor)
        state.row_looked = list(state.row_lengths)


class MassiveActivationCache(PolicyCache):
    """
    Keeps the tokens with massive activations (https://arxiv.org/abs/2402.17762), the most recent ones, and per KV head
    those with most attention.

    A layer holds `budget` tokens and up to `eviction_interval` more: `batch * kv_heads * (budget + eviction_interval)
    * (2 * head_dim * itemsize + 8)` bytes. Keys and values tell massive tokens, in the prompt and in the answer. The
    model's RoPE must rotate by the position alone. See `SnapKVCache` and `PolicyCache` for other arguments and errors.

    Args:
        kernel_size (`int`, defaults to 13): Over how many neighbouring tokens attention is averaged. Odd. Larger
            values keep fewer and longer passages; 1 scores each token alone.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import MassiveActivationCache
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> cache = MassiveActivationCache(model.config, budget=16, window_size=8)
    >>> tokens = model.generate(torch.arange(40)[None], past_key_values=cache, max_new_tokens=8, eos_token_id=None)
    >>> [(token.position, token.reason) for token in cache.massive_tokens()[0][0]]
    [(0, 'first tokens'), (1, 'first tokens'), (2, 'first tokens'), (3, 'first tokens')]

    ```
    """

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        budget: float | int | str = 0.2,
        *,
        window_size: int = 64,
        kernel_size: int = 13,
        **options: Unpack[EvictionOptions],
    ) -> None:
        policy = MassiveActivationPolicy(window_size, kernel_size)
        super().__init__(config, budget, policy, **options)

    def massive_tokens(self) -> dict[int, list[list[MassiveToken]]]:
        """
        The tokens that never go, and why. A layer that keeps fewer tokens than these loses the oldest of them.

        Returns:
            `dict[int, list[list[MassiveToken]]]`: By the index of each layer that evicts, for each row.
        """
        return {layer.place.layer_idx: massive_tokens_of(layer.state) for layer in self.compressed_layers}


def massive_tokens_of(state: MassiveState) -> list[list[MassiveToken]]:
    """The tokens of each row that a layer in this state never evicts."""
    if state.found_positions is None:
        return [[] for _ in state.row_lengths]
    tensors = (state.found_positions, state.found_ratios, state.found_cosines)
    rows = []
    for length, *numbers in zip(state.row_lengths, *(tensor.tolist() for tensor in tensors), strict=True):
        found = [(position, "keys and values", *told) for position, *told in zip(*numbers, strict=True)]
        if found[0][0] < 0:
            found = [(position, "first tokens") for position in range(detection.NUM_FIRST_TOKENS)]
        rows.append([MassiveToken(*token) for token in found if 0 <= token[0] < length])
    return rows
