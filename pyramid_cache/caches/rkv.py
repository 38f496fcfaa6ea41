"""
R-KV of Cai et al., 2025 (https://arxiv.org/abs/2505.24133).

Reasoning models repeat themselves, and repeated tokens all draw attention. A token's score is therefore its importance
less its redundancy. Importance is the attention of the last queries to it or to a neighbour. Redundancy is how similar
its key is to the other keys of its head. Of keys that are nearly alike, the latest is not redundant.

Departures from their code: query heads are averaged, not maximised. All queries of an answer count, the last most.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import Unpack

from pyramid_cache.caches.snapkv import SnapKVPolicy
from pyramid_cache.engine.budget import read_count, read_number
from pyramid_cache.engine.policy import ScoringView, kernel_setting, setting
from pyramid_cache.engine.policy_cache import CommonOptions, PolicyCache
from pyramid_cache.engine.selection import gather_tokens


# Similarities held at once, which take 16 MiB: all of a prompt of 16,384 tokens and 8 KV heads would take 8 GiB.
SIMILARITIES_PER_CHUNK = 1 << 22


@dataclass(frozen=True)
class RKVPolicy(SnapKVPolicy):
    """SnapKV's window; a token's score is its importance less its redundancy. See `RKVCache` for the fields."""

    window_size: int = setting(8, read_count, 1)
    kernel_size: int = kernel_setting(7)
    importance_weight: float = setting(0.1, read_number, "[0, 1]")
    similarity_threshold: float = setting(0.5, read_number, "[0, 1]")

    def score(self, view: ScoringView) -> torch.Tensor:
        is_recent = view.is_recent(self.window_size)
        importance = view.attention.masked_fill(is_recent | ~view.is_token, 0)
        importance = importance / importance.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        importance = view.pool(importance, self.kernel_size, "maximum")
        scores = self.importance_weight * importance - (1 - self.importance_weight) * self._redundancy(view)
        return scores.masked_fill(is_recent, float("inf"))

    def _redundancy(self, view: ScoringView) -> torch.Tensor:
        """`(batch, kv_heads, tokens)`, a distribution over each head's tokens."""
        key = torch.nn.functional.normalize(view.key.float(), dim=-1).masked_fill(~view.is_token[..., None], 0)
        # From the oldest to the latest: the latest of those that are alike is then the one of the highest rank.
        order = view.positions.argsort(dim=-1, stable=True).expand(key.shape[:3])
        key = gather_tokens(key, order)
        ranks = torch.arange(1, key.shape[2] + 1, dtype=torch.float32, device=key.device)
        # The sum of a key's cosines with all others; what each of them does not blame it for comes off below.
        similarity = (key * (key.sum(dim=2, keepdim=True) - key)).sum(dim=-1)
        num_rows = max(SIMILARITIES_PER_CHUNK // similarity.numel(), 1)
        for start in range(0, key.shape[2], num_rows):
            rows = key[:, :, start : start + num_rows]
            cosines = rows @ key.mT  # (batch, kv_heads, rows, tokens)
            cosines.diagonal(offset=start, dim1=-2, dim2=-1).zero_()
            # Where the latest key is that is alike, -1 for none; in place, for memory is what this waits for.
            latest = cosines.gt_(self.similarity_threshold).mul_(ranks).amax(dim=-1).long() - 1
            spared = (rows * gather_tokens(key, latest)).sum(dim=-1).masked_fill(latest < 0, 0)
            similarity.scatter_add_(-1, latest.clamp(min=0), -spared)
        mean = torch.empty_like(similarity).scatter_(-1, order, similarity) / view.is_token.sum(dim=-1, keepdim=True)
        return mean.masked_fill(~view.is_token, float("-inf")).softmax(dim=-1)


class RKVCache(PolicyCache):
    """
    Keeps, per KV head, the most recent tokens and those that get attention and are unlike the others (R-KV,
    https://arxiv.org/abs/2505.24133). It is made for the long answers of reasoning models, which repeat themselves.

    A layer holds `budget` tokens and up to `eviction_interval` more: `batch * kv_heads * (budget + eviction_interval)
    * (2 * head_dim * itemsize + 8)` bytes. The time to compare all keys of a prompt grows with its length's square.
    Long answers need an int as the budget. See `PolicyCache` for the other arguments and the errors.

    Args:
        window_size (`int`, defaults to 8): How many of the last queries tell importance. As many of the last tokens
            always stay, but no more than half of the budget.
        kernel_size (`int`, defaults to 7): Over how many neighbouring tokens the largest importance is taken. Odd.
        importance_weight (`float`, defaults to 0.1): The weight of importance, from 0 to 1; redundancy has the rest.
        similarity_threshold (`float`, defaults to 0.5): The cosine, from 0 to 1, above which two keys are alike.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import RKVCache
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> cache = RKVCache(model.config, budget=16, eviction_interval=32)
    >>> tokens = model.generate(torch.arange(8)[None], past_key_values=cache, max_new_tokens=60, eos_token_id=None)
    >>> cache.get_seq_length(), cache.num_kept_tokens()
    (67, [35, 35])

    ```
    """

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        budget: float | int | str = 0.2,
        *,
        window_size: int = 8,
        kernel_size: int = 7,
        importance_weight: float = 0.1,
        similarity_threshold: float = 0.5,
        eviction_interval: int = 128,
        **options: Unpack[CommonOptions],
    ) -> None:
        policy = RKVPolicy(window_size, kernel_size, importance_weight, similarity_threshold)
        super().__init__(config, budget, policy, eviction_interval=eviction_interval, **options)
