"""
R-KV of Cai et al., 2025 (https://arxiv.org/abs/2505.24133).

Reasoning models repeat themselves, and repeated tokens all draw attention. A token's score is therefore its importance
less its redundancy. Importance is the attention of the last queries to the token or to a neighbour. Redundancy is how
similar its key is to the other keys of its head. Of keys that are nearly alike, the latest is not counted as
redundant. Generated tokens gather in a buffer until as many are evicted.

Departures from the paper and the authors' code: importance is the mean over the query heads of a KV head (theirs takes
the largest logit). While an answer is generated, it is an average over all queries, in which the last ones weigh most.
A prompt is compressed as well. As in their code, one recent copy is spared, and probabilities are averaged over
queries before they are pooled. Both terms are distributions: importance over the candidates, redundancy by a softmax
over all tokens.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pyramid_cache.engine.budget import is_number, read_count, read_kernel_size
from pyramid_cache.engine.policy import Policy, ScoringView
from pyramid_cache.engine.policy_cache import PolicyCache


# Similarities held at once, which take 16 MiB: all of a prompt of 16,384 tokens and 8 KV heads would take 8 GiB.
SIMILARITIES_PER_CHUNK = 1 << 22


@dataclass(frozen=True)
class RKVPolicy(Policy):
    """A token's score is its importance less its redundancy. See `RKVCache` for the fields."""

    window_size: int = 8
    kernel_size: int = 7
    importance_weight: float = 0.1
    similarity_threshold: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "window_size", read_count("window_size", self.window_size, least=1))
        object.__setattr__(self, "kernel_size", read_kernel_size(self.kernel_size))
        for name, meaning in (
            ("importance_weight", "the rest of the score is redundancy"),
            ("similarity_threshold", "it is the cosine above which two keys count as alike"),
        ):
            number = getattr(self, name)
            if not is_number(number) or not 0 <= number <= 1:
                raise ValueError(f"`{name}={number!r}` must be from 0 to 1: {meaning}.")
            object.__setattr__(self, name, float(number))

    def score(self, view: ScoringView) -> torch.Tensor:
        is_recent = view.is_recent(self.window_size)
        importance = view.attention.masked_fill(is_recent | ~view.is_token, 0)
        importance = importance / importance.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        importance = view.pool(importance, self.kernel_size, "maximum")
        redundancy = self._redundancy(view)
        scores = self.importance_weight * importance - (1 - self.importance_weight) * redundancy
        return scores.masked_fill(is_recent, float("inf"))

    def _redundancy(self, view: ScoringView) -> torch.Tensor:
        """`(batch, kv_heads, tokens)`, a distribution over each head's tokens."""
        key = torch.nn.functional.normalize(view.key.float(), dim=-1).masked_fill(~view.is_token[..., None], 0)
        # From the oldest to the latest: the latest of those that are alike is then the one of the highest rank.
        order = view.positions.argsort(dim=-1, stable=True).expand(key.shape[:3])
        key = key.gather(2, order[..., None].expand_as(key))
        ranks = torch.arange(1, key.shape[2] + 1, dtype=torch.float32, device=key.device)
        # The sum of a key's cosines with all others; what each of them does not blame it for comes off below.
        similarity = (key * (key.sum(dim=2, keepdim=True) - key)).sum(dim=-1)
        num_rows = max(SIMILARITIES_PER_CHUNK // similarity.numel(), 1)
        for start in range(0, key.shape[2], num_rows):
            rows = key[:, :, start : start + num_rows]
            cosines = rows @ key.mT  # (batch, kv_heads, rows, tokens)
            cosines.diagonal(offset=start, dim1=-2, dim2=-1).zero_()
            # The rank of the latest key that is alike, 0 for none; in place, for memory is what this waits for.
            latest = cosines.gt_(self.similarity_threshold).mul_(ranks).amax(dim=-1).long()
            index = (latest - 1).clamp(min=0)
            spared = (rows * key.gather(2, index[..., None].expand_as(rows))).sum(dim=-1).masked_fill(latest == 0, 0)
            similarity.scatter_add_(-1, index, -spared)
        similarity = torch.empty_like(similarity).scatter_(-1, order, similarity)
        mean = similarity / view.is_token.sum(dim=-1, keepdim=True).clamp(min=1)
        return mean.masked_fill(~view.is_token, float("-inf")).softmax(dim=-1)


class RKVCache(PolicyCache):
    """
    Keeps, per KV head, the most recent tokens and those that get attention and are unlike the others (R-KV,
    https://arxiv.org/abs/2505.24133). It is made for long answers that repeat themselves, as reasoning models give
    them.

    A layer holds `budget` tokens and up to `eviction_interval` more, however much is generated: `batch * kv_heads *
    (budget + eviction_interval) * (2 * head_dim * itemsize + 8)` bytes. The prompt is read with full attention, so the
    first new token is exact. All keys of a prompt are compared with each other. That takes time that grows with the
    square of its length, and 16 MiB beside a few copies of the keys in float32.

    Args:
        config (`PreTrainedConfig` or `PreTrainedModel`): The config of the model, or the model itself.
        budget (`float`, `int` or `str`, defaults to 0.2): What each layer keeps: a fraction of the prompt, a number of
            tokens, or bytes for all layers that evict ("256MiB"). In later turns, a fraction is of all tokens seen.
            1.0 never evicts. Long answers to short prompts need a number of tokens.
        window_size (`int`, defaults to 8): How many of the last queries tell importance. As many of the last tokens
            always stay, but no more than half of the budget.
        kernel_size (`int`, defaults to 7): Over how many neighbouring tokens the largest importance is taken. Odd.
            Larger values keep fewer and longer passages; 1 scores each token alone.
        importance_weight (`float`, defaults to 0.1): The paper's lambda, from 0 to 1: the weight of importance.
            Redundancy has the rest. Larger values keep copies of important tokens, smaller ones keep different tokens.
        similarity_threshold (`float`, defaults to 0.5): The cosine above which two keys count as alike, from 0 to 1.
            Larger values spare only close copies.
        eviction_interval (`int`, defaults to 128): The paper's buffer: how many generated tokens arrive before as many
            are evicted. Larger values take more memory and less time.

    Raises:
        ValueError: For an argument outside these ranges, or a model that cannot be compressed.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import RKVCache
    >>> import torch

    >>> config = LlamaConfig(
    ...     hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    ... )
    >>> model = LlamaForCausalLM(config)
    >>> cache = RKVCache(model.config, budget=16, eviction_interval=32)
    >>> tokens = model.generate(torch.arange(8)[None], past_key_values=cache, max_new_tokens=60, eos_token_id=None)
    >>> cache.get_seq_length(), cache.num_kept_tokens()
    (67, [35, 35])
    >>> cache.compress()
    >>> cache.num_kept_tokens()
    [16, 16]

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
    ) -> None:
        policy = RKVPolicy(
            window_size=window_size,
            kernel_size=kernel_size,
            importance_weight=importance_weight,
            similarity_threshold=similarity_threshold,
        )
        super().__init__(config, budget, policy, eviction_interval=eviction_interval)
