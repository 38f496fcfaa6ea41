"""
Expected Attention of Devoto, Jeblick and Jégou, 2025 (https://arxiv.org/abs/2510.00636).

The queries of one head are much alike. Before RoPE they are close to a Gaussian, whose mean and covariance the prompt
shows. Rotated to the positions that come next, the Gaussian gives each key's expected exponential logit in closed
form: `exp(mean · key + key · covariance · key / 2)`. A token's score is its share of these, averaged over the query
heads of a KV head, times the norm of its value.

Departures from the paper: the norm is the value's own, not that behind the output projection, which a cache does not
see (the authors' library does the same). The statistics cover all queries of the prompts so far, not the last 128.
They stay in use while an answer is generated, rotated to its current end. They leave out the queries of the first
tokens, as the authors' library does: attention sinks have queries like no others.
"""

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import Unpack

from pyramid_cache.engine.budget import read_count, read_number
from pyramid_cache.engine.policy import Policy, PromptView, ScoringView, setting
from pyramid_cache.engine.policy_cache import EvictionOptions, PolicyCache
from pyramid_cache.engine.rotation import RotaryFrequencies, turned
from pyramid_cache.engine.state import LayerState, number, row


# Queries whose statistics are taken at once: copies in float32 of a long prompt's would be larger than its cache.
QUERIES_PER_CHUNK = 1024


@dataclass(eq=False)
class QueryStatistics(LayerState):
    """
    Describes the queries before RoPE, scaled as attention scales them: their number `query_count` `(batch, 1)`, their
    mean `query_mean` `(batch, heads, head_dim)`, and the upper triangle of their covariance `query_covariance`
    `(batch, heads, head_dim * (head_dim + 1) / 2)`. `frequencies` `(batch, rotary_dim / 2)` and `is_interleaved` say
    how the model rotates them, see `RotaryFrequencies`. All tensors are float32.
    """

    query_count: torch.Tensor | None = row()
    query_mean: torch.Tensor | None = row()
    query_covariance: torch.Tensor | None = row()
    frequencies: torch.Tensor | None = row()
    is_interleaved: int = number(0)


@dataclass(frozen=True)
class ExpectedAttentionPolicy(Policy):
    """A token's score is its expected attention times the norm of its value. See `ExpectedAttentionCache`."""

    num_future_positions: int = setting(512, read_count, 1)
    num_sink_tokens: int = setting(4, read_count, 0)
    use_covariance: bool = True
    epsilon: float = setting(0.0, read_number, "[0, inf)")

    state_class = QueryStatistics
    needs_rotary = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.use_covariance, bool):
            raise ValueError(f"`use_covariance={self.use_covariance!r}` must be True or False.")

    def observe(self, prompt: PromptView) -> None:
        state, (batch_size, heads, num_queries, head_dim) = prompt.state, prompt.query.shape
        count, mean, covariance = state.query_count, state.query_mean, None
        if count is None:
            count, mean = (prompt.query.new_zeros(batch_size, *rest).float() for rest in ((1,), (heads, head_dim)))
        if self.use_covariance:
            covariance = prompt.query.new_zeros(batch_size, heads, head_dim, head_dim).float()
            if state.query_covariance is not None:
                covariance = unpacked(state.query_covariance, head_dim)
        for start in range(0, num_queries, QUERIES_PER_CHUNK):
            chunk = slice(start, start + QUERIES_PER_CHUNK)
            query, positions = prompt.query[:, :, chunk].float(), prompt.query_positions[..., chunk]
            is_counted = positions >= self.num_sink_tokens
            query = replace(prompt, query=query, query_positions=positions).unrotated_query() * prompt.scaling
            query = query.masked_fill(~is_counted[..., None], 0)

            num_new = is_counted.sum(dim=-1).float()  # (batch, 1)
            new_mean = query.sum(dim=2) / num_new.clamp(min=1)[..., None]
            share = (num_new / (count + num_new).clamp(min=1))[..., None]
            difference = new_mean - mean
            if covariance is not None:
                centered = (query - new_mean[:, :, None]).masked_fill(~is_counted[..., None], 0)
                new_covariance = centered.mT @ centered / num_new.clamp(min=1)[..., None, None]
                between = difference[..., None] * difference[..., None, :]
                covariance = covariance.lerp(new_covariance, share[..., None])
                covariance = covariance + (share * (1 - share))[..., None] * between
            mean = mean + share * difference
            count = count + num_new
        state.query_count, state.query_mean = count, mean
        state.query_covariance = None if covariance is None else packed(covariance)
        rotary = prompt.rotary or RotaryFrequencies(mean.new_zeros(0))
        frequencies = rotary.model_angles(mean.new_ones(1), prompt.longest).float()
        state.frequencies, state.is_interleaved = frequencies.repeat(batch_size, 1), int(rotary.layout != "half")

    def score(self, view: ScoringView) -> torch.Tensor:
        key = view.key.float()
        kv_heads, head_dim = key.shape[1], key.shape[3]
        is_first = view.is_first(self.num_sink_tokens)
        mean = self._turned_to_future(view.state.query_mean[:, :, None], view).view(len(key), kv_heads, -1, head_dim)
        logits = mean @ key.mT  # (batch, kv_heads, group, tokens)
        if self.use_covariance:
            covariance = unpacked(view.state.query_covariance, head_dim)
            # The turn of both sides of a symmetric matrix.
            covariance = self._turned_to_future(self._turned_to_future(covariance, view).mT, view)
            for member, of_heads in enumerate(covariance.unflatten(1, (kv_heads, -1)).unbind(dim=2)):
                logits[:, :, member] += (key @ of_heads * key).sum(dim=-1) / 2
        logits = logits.masked_fill((~view.is_token | is_first)[:, :, None], float("-inf"))
        expected = logits.softmax(dim=-1).mean(dim=2)
        scores = (expected + self.epsilon) * view.value.float().norm(dim=-1)
        return scores.masked_fill(is_first, float("inf"))

    def _turned_to_future(self, vectors: torch.Tensor, view: ScoringView) -> torch.Tensor:
        """The average of vectors `(batch, heads, any, head_dim)` over turns to each of the next positions."""
        # All rows have the same frequencies.
        rotary = RotaryFrequencies(view.state.frequencies[0], "interleaved" if view.state.is_interleaved else "half")
        angles = rotary.angles(view.length + torch.arange(self.num_future_positions, device=vectors.device))
        cosine, sine = (wave.mean(dim=2, keepdim=True) for wave in rotary.cosine_and_sine(angles, vectors))
        return turned(vectors, rotary.quarter_turn(vectors), cosine, sine)


def packed(matrices: torch.Tensor) -> torch.Tensor:
    """The upper triangles `(..., n * (n + 1) / 2)` of symmetric matrices `(..., n, n)`."""
    rows, columns = torch.triu_indices(matrices.shape[-1], matrices.shape[-1], device=matrices.device)
    return matrices[..., rows, columns]


def unpacked(triangles: torch.Tensor, size: int) -> torch.Tensor:
    """The symmetric matrices `(..., size, size)` of which `packed` gave the triangles."""
    rows, columns = torch.triu_indices(size, size, device=triangles.device)
    matrices = triangles.new_empty(*triangles.shape[:-1], size, size)
    matrices[..., rows, columns] = triangles
    matrices[..., columns, rows] = triangles
    return matrices


class ExpectedAttentionCache(PolicyCache):
    """
    Keeps, per KV head, the first tokens and those that future queries are expected to attend to (Expected Attention,
    https://arxiv.org/abs/2510.00636).

    It needs no attention weights, but RoPE that rotates by the position alone. A layer holds `budget` tokens and up to
    `eviction_interval` more: `batch * kv_heads * (budget + eviction_interval) * (2 * head_dim * itemsize + 4)` bytes.
    It also holds statistics of the queries, which a budget in bytes does not count: `batch * 4 * (heads * head_dim *
    (head_dim + 3) / 2 + head_dim / 2 + 1)` bytes. With 32 heads over 8 KV heads of width 128 in bfloat16, they take as
    much as 260 tokens; without `use_covariance`, as 4 tokens. See `PolicyCache` for the other arguments and errors.

    Args:
        num_future_positions (`int`, defaults to 512): Over how many positions behind the last token attention is
            expected. Larger values look further ahead, and depend less on the distance.
        num_sink_tokens (`int`, defaults to 4): The first tokens, which always stay.
        use_covariance (`bool`, defaults to `True`): Whether the spread of the queries counts beside their mean.
            `False` takes less memory and time.
        epsilon (`float`, defaults to 0.0): Added to each token's share of attention before the share is multiplied
            with the norm. Larger values let the norm decide between tokens that expect little attention.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import ExpectedAttentionCache
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> cache = ExpectedAttentionCache(model.config, budget=16)
    >>> tokens = model.generate(torch.arange(40)[None], past_key_values=cache, max_new_tokens=8, eos_token_id=None)
    >>> cache.get_seq_length(), cache.num_kept_tokens()
    (47, [23, 23])

    ```
    """

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        budget: float | int | str = 0.2,
        *,
        num_future_positions: int = 512,
        num_sink_tokens: int = 4,
        use_covariance: bool = True,
        epsilon: float = 0.0,
        **options: Unpack[EvictionOptions],
    ) -> None:
        policy = ExpectedAttentionPolicy(num_future_positions, num_sink_tokens, use_covariance, epsilon)
        super().__init__(config, budget, policy, **options)
