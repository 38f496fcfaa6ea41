"""
R-KV of Cai et al., 2025 (https://arxiv.org/abs/2505.24133).

Reasoning models say the same thing again and again, and tokens that repeat each other draw attention to all copies. A
token is therefore worth its importance, the attention of the last queries to it or to a neighbour, less its
redundancy, how much its key points where the other keys of its head do. Of keys that are nearly alike, the latest is
not blamed for the others. While an answer is generated, tokens gather in a buffer before as many go.

Departures from the paper and the authors' code: importance is that of the mean over the query heads of a KV head
(theirs takes their largest logit), and while an answer is generated an average over all queries in which the last ones
weigh most; a prompt is compressed as well (theirs can, but is meant for long answers). Following their code, one
recent copy is spared, probabilities are averaged over queries before they are pooled, and both terms are
distributions: importance over the candidates, redundancy by a softmax over all tokens.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pyramid_cache.engine.budget import is_number, read_count
from pyramid_cache.engine.policy import Policy, ScoringView
from pyramid_cache.engine.policy_cache import PolicyCache


# Similarities held at once, which take 16 MiB: all of a prompt of 16,384 tokens and 8 KV heads would take 8 GiB.
SIMILARITIES_PER_CHUNK = 1 << 22


@dataclass(frozen=True)
class RKVPolicy(Policy):
    """A token is worth its importance less its redundancy. See `RKVCache` for the fields."""

    window_size: int = 8
    kernel_size: int = 7
    importance_weight: float = 0.1
    similarity_threshold: float = 0.5

    def __post_init__(self) -> None:
        for name in ("window_size", "kernel_size"):
            object.__setattr__(self, name, read_count(name, getattr(self, name), least=1))
        if self.kernel_size % 2 == 0:
            raise ValueError(
                f"`kernel_size={self.kernel_size}` must be odd, for a token is in the middle of its neighbours. Give "
                f"{self.kernel_size - 1} or {self.kernel_size + 1}."
            )
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
    Keeps, per KV head, the tokens that are attended to and unlike the others, and the most recent ones (R-KV,
    https://arxiv.org/abs/2505.24133). Made for long answers that repeat themselves, as reasoning models give them.

    A layer holds `budget` tokens and up to `eviction_interval` more, however much is generated: `batch * kv_heads *
    (budget + eviction_interval) * (2 * head_dim * itemsize + 8)` bytes. The prompt is read with full attention, so the
    first new token is exact; to compare all its keys with each other takes time that grows with the square of its
    length, and 16 MiB beside a few copies of the keys in float32.

    Args:
        config (`PreTrainedConfig` or `PreTrainedModel`): Of the model, or the model, whose config is taken.
        budget (`float`, `int` or `str`): What each layer keeps: a fraction of the prompt (of everything seen, when a
            later turn brings several tokens at once), a number of tokens, or bytes for the layers that evict such as
            "256MiB". 1.0 never evicts. Answers that are long beside their prompt need a number of tokens.
        window_size (`int`, defaults to 8): How many of the last queries tell what is important, and how many of the
            last tokens are kept for certain (but no more than half of the budget).
        kernel_size (`int`, defaults to 7): Odd: over how many neighbouring tokens the largest importance is taken.
            Larger values keep longer passages, and fewer of them; 1 scores each token alone.
        importance_weight (`float`, defaults to 0.1): From 0 to 1, the paper's lambda: how much importance counts, the
            rest being redundancy. Larger values keep copies of what is attended to, smaller ones what is different.
        similarity_threshold (`float`, defaults to 0.5): From 0 to 1, the cosine above which two keys are alike, so
            that the latest of them is spared. Larger values spare only close copies.
        eviction_interval (`int`, defaults to 128): Generated tokens that come in before as many go, the paper's
            buffer. Larger values take more memory and less time.

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
