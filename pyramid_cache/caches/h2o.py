"""
H2O: the Heavy-Hitter Oracle of Zhang et al., 2023 (https://arxiv.org/abs/2306.14048).

A token that got much attention so far will get much again. Every key accumulates the attention probability that all
queries give it. Each KV head keeps the keys with the highest sums, the heavy hitters, and a window of the most recent
tokens. A decode step adds one token and evicts one (paper, Algorithm 1).

Departures from the authors' code: sums are kept per row of the batch (theirs add the rows up). With grouped-query
attention, a KV head's sum is over its query heads. Keys keep their original positions.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import Unpack

from pyramid_cache.engine.budget import floor_of_product, read_number
from pyramid_cache.engine.policy import Policy, ScoringView, setting
from pyramid_cache.engine.policy_cache import CommonOptions, PolicyCache
from pyramid_cache.engine.state import LayerState, row
from pyramid_cache.ops.transfer import numbers_on


@dataclass(eq=False)
class WindowState(LayerState):
    """`num_recent` `(batch, 1, 1)` int32: the size of the recent window."""

    num_recent: torch.Tensor | None = row()


@dataclass(frozen=True)
class H2OPolicy(Policy):
    """A token's score is the attention that all queries so far gave it; the recent window always stays."""

    heavy_ratio: float = setting(0.5, read_number, "[0, 1)")

    window_size = None
    state_class = WindowState

    def prepare(self, state: WindowState) -> None:
        recent = [kept - floor_of_product(self.heavy_ratio, kept) for kept in state.row_kept]
        state.num_recent = numbers_on(state.next_position.device, recent, torch.int32).view(-1, 1, 1)

    def score(self, view: ScoringView) -> torch.Tensor:
        return view.attention.masked_fill(view.positions >= view.length - view.state.num_recent, float("inf"))


class H2OCache(PolicyCache):
    """
    Keeps, per KV head, the most recent tokens and those that got most attention so far (H2O,
    https://arxiv.org/abs/2306.14048).

    A layer holds `budget` tokens and up to `eviction_interval` more: `batch * kv_heads * (budget + eviction_interval)
    * (2 * head_dim * itemsize + 8)` bytes. See `PolicyCache` for the other arguments and the errors.

    Args:
        heavy_ratio (`float`, defaults to 0.5): The share of the budget for heavy hitters, less than 1. The recent
            window has the rest, at least one token. Larger values remember more of the distant past.
        eviction_interval (`int`, defaults to 1): How many generated tokens wait for an eviction; 1 as in the paper.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import H2OCache
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> cache = H2OCache(model.config, budget=16)
    >>> tokens = model.generate(torch.arange(40)[None], past_key_values=cache, max_new_tokens=8, eos_token_id=None)
    >>> cache.get_seq_length(), cache.num_kept_tokens()
    (47, [16, 16])

    ```
    """

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        budget: float | int | str = 0.2,
        heavy_ratio: float = 0.5,
        *,
        eviction_interval: int = 1,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(config, budget, H2OPolicy(heavy_ratio), eviction_interval=eviction_interval, **options)
