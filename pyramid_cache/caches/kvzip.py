"""
KVzip and KVzip+ of Kim et al., 2025 (https://arxiv.org/abs/2505.23416).

What a model needs to repeat a context, it needs to answer any question about it. So once a context has been read, the
model reads it again behind the instruction to repeat it, in chunks. A key's score is the highest probability with
which a query of this replay attends to it (paper, Section 3). The question is not needed. KVzip+ weighs each
probability by the norm of what it adds to the hidden state, over the norm of that state. The tokens of all heads of
all layers compete.

Departures from the authors' code: evicted tokens are freed, not masked. Rows of a batch are replayed together, each
with its own chunks. Of generated tokens, which nothing replays, the latest stay, and older ones are the first to go.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Unpack

from pyramid_cache.engine.budget import read_count
from pyramid_cache.engine.policy import Policy, PromptView, ScoringView, setting
from pyramid_cache.engine.policy_cache import EvictionOptions
from pyramid_cache.engine.replay import Chunk, ReplayingCache, ReplayTexts
from pyramid_cache.engine.selection import gather_tokens
from pyramid_cache.engine.state import LayerState, row, slot
from pyramid_cache.ops.reference import grouped_logits, softmax_of_logits


NUM_SINK_TOKENS = 4
# Elements of the probabilities of one KV head that are held at once: 64 MiB in float32.
ROW_ELEMENTS = 1 << 24


@dataclass(eq=False)
class ReplayState(LayerState):
    """
    `importance` `(batch, kv_heads, slots)` float32: the score of each token, -1 for those that were not replayed.
    Between a replay and the eviction, `replayed` `(batch, kv_heads, tokens)` are the scores of the latest tokens, the
    first of which is at the position `replay_start` `(batch, 1, 1)` int32.
    """

    importance: torch.Tensor | None = slot(fill=-1)
    replayed: torch.Tensor | None = row()
    replay_start: torch.Tensor | None = row()


@dataclass(frozen=True)
class KVzipPolicy(Policy):
    """A token's score is the attention that a replay of the context gives it at most. See `KVzipCache`."""

    num_recent: int = setting(128, read_count, 1)

    state_class = ReplayState
    ranking = "model"
    needs_replay = True

    def score(self, view: ScoringView) -> torch.Tensor:
        state, positions = view.state, view.positions.expand(view.key.shape[:3])
        importance = view.remembered("importance")
        if importance is None:
            importance = torch.full(positions.shape, -1.0, device=positions.device)
        if state.replayed is not None:
            index = (positions - state.replay_start).long()
            is_new = view.is_token & (index >= 0) & (index < state.replayed.shape[2])
            scores = state.replayed.gather(2, index.clamp(0, state.replayed.shape[2] - 1))
            importance = torch.where(is_new, scores, importance)
            view.remember("importance", importance)
            state.replayed = state.replay_start = None
        always_stays = (importance < 0) & view.is_recent(self.num_recent) | view.is_first(NUM_SINK_TOKENS)
        return importance.masked_fill(always_stays, float("inf"))


class ReplayScores:
    """
    The scores of the tokens of a chunk.

    Args:
        is_weighed (`bool`): Whether probabilities are weighed, as in KVzip+.

    Attributes:
        scores (`list[torch.Tensor]`): Of each layer so far, `(batch, kv_heads, width)` float32.
    """

    def __init__(self, chunk: Chunk, is_weighed: bool) -> None:
        self.chunk, self.is_weighed = chunk, is_weighed
        self.scores: list[torch.Tensor] = []

    def observe(self, view: PromptView) -> None:
        """The scores of the chunk's keys in a layer, whose latest keys are those of the replay."""
        chunk, (batch_size, heads, num_queries, _) = self.chunk, view.query.shape
        kv_heads, device = view.key.shape[1], view.key.device
        group, num_held = heads // kv_heads, view.key.shape[2] - num_queries
        starts, lengths, num_asking, row_lengths = (
            each.to(device) for each in (chunk.starts, chunk.lengths, chunk.num_queries, chunk.row_lengths)
        )
        # In order, columns without a token come first, then those of the first tokens. The latest tokens are last, and
        # all heads hold them.
        positions = view.positions[..., :num_held]
        order = positions.argsort(dim=-1, stable=True).expand(-1, kv_heads, -1)
        places = torch.arange(chunk.width, device=device)
        ranks = (num_held - row_lengths + starts)[:, None, None] + places
        columns = order.gather(2, ranks.clamp(max=num_held - 1).expand(-1, kv_heads, -1))
        is_in_chunk = (places < lengths[:, None])[:, None, None]
        num_empty = (positions < 0).sum(dim=-1, keepdim=True)
        ranks = (num_empty + torch.arange(NUM_SINK_TOKENS, device=device)).clamp(max=num_held - 1)
        sinks = order.gather(2, ranks.expand(-1, kv_heads, -1))
        positions = positions.expand(-1, kv_heads, -1).gather(2, sinks)
        is_sink = (positions < NUM_SINK_TOKENS) & (positions < starts[:, None, None])

        weights = None
        if self.is_weighed:
            weights = view.projected_value_norms(2, columns)[:, :, None] / view.hidden_norms()[:, None, :, None]
        scores = view.key.new_zeros(batch_size, kv_heads, chunk.width, dtype=torch.float32)
        block = max(ROW_ELEMENTS // (batch_size * group * (chunk.width + num_queries)), 1)
        for head in range(kv_heads):
            members = slice(head * group, (head + 1) * group)
            indices = torch.cat([sinks[:, head], columns[:, head]], dim=-1)[:, None]
            key = torch.cat(
                [gather_tokens(view.key[:, head : head + 1], indices), view.key[:, head : head + 1, num_held:]], dim=2
            ).float()
            bias = None
            if view.bias is not None:
                held = gather_tokens(view.bias[:, head : head + 1], indices)
                bias = functional.pad(held, (0, num_queries))[:, :, None, None]
            for start in range(0, num_queries, block):
                queries = torch.arange(start, min(start + block, num_queries), device=device)
                logits = grouped_logits(view.query[:, members, queries].float(), key, view.scaling, view.softcap)
                logits = logits if bias is None else logits + bias
                is_before = torch.arange(num_queries, device=device) <= queries[:, None]
                parts = is_sink[:, head, None], is_in_chunk[:, 0], is_before[None]
                mask = torch.cat([part.expand(batch_size, len(queries), -1) for part in parts], dim=-1)[:, None, None]
                sink_logits = None if view.sink_logits is None else view.sink_logits[members]
                probabilities = softmax_of_logits(logits, mask, sink_logits)[:, 0]
                found = probabilities[..., NUM_SINK_TOKENS : NUM_SINK_TOKENS + chunk.width]
                if weights is not None:
                    found = found * weights[:, members, queries]
                found = found.masked_fill((queries >= num_asking[:, None])[:, None, :, None], 0)
                scores[:, head] = torch.maximum(scores[:, head], found.amax(dim=(1, 2)))
        self.scores.append(scores)


def give_scores(layers: Sequence[Any], chunks: Sequence[ReplayScores], starts: torch.Tensor) -> None:
    """Gives layers the scores of all chunks; `starts` `(batch,)` are the positions of the first tokens."""
    for depth, layer in enumerate(layers):
        scores = torch.cat([chunk.scores[depth] for chunk in chunks], dim=2)
        layer.state.replayed = scores
        layer.state.replay_start = starts[:, None, None].to(scores.device, torch.int32)


class KVzipCache(ReplayingCache):
    """
    Keeps what the model needs to repeat its context (KVzip, https://arxiv.org/abs/2505.23416). The question may come
    later: ask as many as you like about the compressed context.

    Each prompt, and each later turn of several tokens, is read whole, and then once more in chunks. Reading takes
    longer: this replay attends to the context too, and its attention is computed once more for the scores. While it
    lasts, it takes the memory of `DynamicCache`. Then a layer holds `budget` tokens per head on average over all
    layers, and up to `eviction_interval` more in each head. See `PolicyCache` for the errors and the other arguments,
    of which `ranking="model-online"` is refused. With any ranking, `compress` takes a fraction of the last prompt.

    Args:
        model (`PreTrainedModel`): The model, which reads its context again. Hooks stay on it, and do nothing without
            such a cache.
        budget (`float`, `int` or `str`, defaults to 0.3): See `PolicyCache`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Tells the ids of the instruction to repeat and of the chat
            template. By default the one that was saved with the model.
        texts (`ReplayTexts`, *optional*): These ids, instead of a tokenizer. `ReplayTexts((), (), ())` has none. What
            the template puts in front of all messages, such as a default system prompt, is not repeated, and goes
            first. `protect` keeps it.
        chunk_size (`int`, defaults to 2048): How many tokens are repeated at once. Larger chunks take more memory.
        num_recent (`int`, defaults to 128): How many of the latest generated tokens stay, at most half of the budget.

    Raises:
        ValueError: Neither a tokenizer nor texts, and none was saved with the model; ids that the model has not; or it
            is given a config.
        NotImplementedError: The model has an encoder, or a prompt is given as embeddings or has images.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import KVzipCache, ReplayTexts
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> cache = KVzipCache(model, budget=16, texts=ReplayTexts((5, 6), (5, 7), (8,)))
    >>> tokens = model.generate(torch.arange(40)[None], past_key_values=cache, max_new_tokens=1, eos_token_id=None)
    >>> cache.get_seq_length(), sum(cache.num_kept_tokens()) <= 2 * 16
    (40, True)

    ```
    """

    is_weighed = False

    def __init__(
        self,
        model: PreTrainedModel,
        budget: float | int | str = 0.3,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        texts: ReplayTexts | Sequence[Sequence[int]] | None = None,
        chunk_size: int = 2048,
        num_recent: int = 128,
        **options: Unpack[EvictionOptions],
    ) -> None:
        super().__init__(model, budget, KVzipPolicy(num_recent), tokenizer, texts, chunk_size, **options)

    def watch(self, chunk: Chunk) -> ReplayScores:
        return ReplayScores(chunk, self.is_weighed)

    def take_in(self, watchers: list[ReplayScores], starts: torch.Tensor) -> None:
        give_scores(self.compressed_layers, watchers, starts)


class KVzipPlusCache(KVzipCache):
    """
    `KVzipCache` with the weights of KVzip+: a probability counts by the norm of what it adds to the hidden state, over
    the norm of that state. See `KVzipCache` for arguments and errors.

    Raises:
        NotImplementedError: The attention layers have no output projection under a known name.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import KVzipPlusCache, ReplayTexts
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> cache = KVzipPlusCache(model, budget=0.5, texts=ReplayTexts((), (), ()))
    >>> output = model(torch.arange(40)[None], past_key_values=cache)
    >>> sum(cache.num_kept_tokens()) <= 2 * 20
    True

    ```
    """

    is_weighed = True
