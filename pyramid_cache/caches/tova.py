"""
TOVA of Oren et al., 2024: Token Omission Via Attention (https://arxiv.org/abs/2401.06104).

A transformer with a bounded cache is a recurrent network with several states. It drops the state that the newest query
attends to least. Attention is averaged over all heads of a layer, which keep the same tokens. There is no recent
window: attention alone decides.

Departures from the authors' code: the newest token always stays. A prompt that exceeds the budget loses its tokens at
once, by the attention of its last query.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import Unpack

from pyramid_cache.engine.policy import Policy, ScoringView
from pyramid_cache.engine.policy_cache import CommonOptions, PolicyCache


@dataclass(frozen=True)
class TOVAPolicy(Policy):
    """A token's score is the attention of the last query to it, averaged over all heads."""

    window_size = 1
    heads_share_tokens = True

    def score(self, view: ScoringView) -> torch.Tensor:
        return view.attention.masked_fill(view.positions >= view.length - 1, float("inf"))


class TOVACache(PolicyCache):
    """
    Keeps the tokens that the last query attends to most, the same in all heads of a layer (TOVA,
    https://arxiv.org/abs/2401.06104).

    A layer holds `budget` tokens and up to `eviction_interval` more: `batch * (budget + eviction_interval) * (2 *
    kv_heads * head_dim * itemsize + 8)` bytes. See `PolicyCache` for the other arguments and the errors.

    Args:
        eviction_interval (`int`, defaults to 1): How many generated tokens arrive before as many are evicted; 1 as in
            the paper. Larger values take more memory and less time, and let one query decide about several tokens.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import TOVACache
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> cache = TOVACache(model.config, budget=16)
    >>> tokens = model.generate(torch.arange(40)[None], past_key_values=cache, max_new_tokens=8, eos_token_id=None)
    >>> cache.get_seq_length(), cache.num_kept_tokens()
    (47, [16, 16])

    ```
    """

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        budget: float | int | str = 0.2,
        *,
        eviction_interval: int = 1,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(config, budget, TOVAPolicy(), eviction_interval=eviction_interval, **options)
