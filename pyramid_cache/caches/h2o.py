"""
H2O: the Heavy-Hitter Oracle of Zhang et al., 2023 (https://arxiv.org/abs/2306.14048).

A token that got much attention so far will get much again. Every key accumulates the attention probability that all
queries give it. Each KV head keeps the keys with the highest sums, the heavy hitters, and a window of the most recent
tokens. A decode step adds one token and evicts one (paper, Algorithm 1).

Departures from the authors' code: sums are kept per row of the batch (theirs add the rows up). With grouped-query
attention, a KV head's sum is over its query heads. Keys keep their original positions.
"""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.budget import Budget, floor_of_product, is_number, parse_budget
from pyramid_cache.engine.cache import CompressedCache, config_and_model
from pyramid_cache.engine.layer import CompressedLayer, LayerPlace, grown
from pyramid_cache.engine.scoring import attend_and_score
from pyramid_cache.engine.selection import best_tokens, gather_tokens
from pyramid_cache.engine.tokens import MaskReader, Tokens
from pyramid_cache.ops import decode_attention
from pyramid_cache.ops.reference import decode_probabilities


class H2OLayer(CompressedLayer):
    """
    One layer of `H2OCache`. Beside keys and values it holds, per KV head and slot, the position and the accumulated
    score (float32). One slot is spare: a new token is written there and attends. Then the token with the lowest score
    leaves, and its slot is the spare one.
    """

    scores: torch.Tensor | None

    slot_tensors = ("keys", "values", "positions", "scores")
    # `free_slots` `(batch, kv_heads, 1)`: where the next token goes, known as long as all rows are full.
    row_tensors = ("next_position", "column_positions", "num_recent", "free_slots")
    num_spare_slots = 1
    heads_share_positions = False

    def __init__(self, place: LayerPlace, budget: Budget, masks: MaskReader, heavy_ratio: float) -> None:
        super().__init__(place, budget, masks)
        self.heavy_ratio = heavy_ratio

    @property
    def score_label(self) -> str:
        return "attention so far (sum of probabilities over queries)"

    def _slot_scores(self) -> torch.Tensor | None:
        return None if self.scores is None else self.scores[..., : self.length]

    def num_tokens_to_keep(self, row_length: int) -> int:
        return self.token_budget.num_tokens(row_length)

    def attend_prompt(self, call: AttentionCall, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.budget.is_unlimited:
            return call.run()
        if self.positions is not None:
            call = self.with_slot_mask(call, tokens.positions >= 0 if tokens.has_gaps else None)
        output, scores = attend_and_score(call, tokens, call.num_queries)
        if self.scores is not None:
            num_earlier = call.num_keys - call.num_queries
            scores[..., :num_earlier] += self.scores[..., :num_earlier]
        self.num_recent = self.per_row([kept - floor_of_product(self.heavy_ratio, kept) for kept in self.row_kept])
        if self.positions is None and not self.must_evict:
            self.scores = grown(scores, self.length, self.keys.shape[2], fill=0)
        else:
            self._keep_best(call.key, call.value, scores, tokens)
        return output

    def attend_step(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.positions is None:
            return self._attend_dense_step(call)
        is_held = self.slot_mask()
        output, _, probabilities = decode_attention(
            call.query, self.keys, self.values, mask=is_held, **call.logit_arguments
        )
        self.scores += probabilities.detach()
        self._evict(is_held)
        return output, None

    def _evict(self, is_held: torch.Tensor | None) -> None:
        """Evicts, from each head of the rows that are full, the token of lowest score outside the recent window."""
        is_full = [held > kept for held, kept in zip(self.row_held, self.row_kept, strict=True)]
        is_protected = self.positions >= self.next_position - self.num_recent
        if is_held is not None:
            is_protected |= ~is_held
        if not all(is_full):
            is_protected |= ~self.per_row(is_full).bool()
        victims = lowest_slots(self.scores, self.positions, is_protected)
        may_go = ~is_protected.gather(-1, victims)
        self.positions.scatter_(-1, victims, self.positions.gather(-1, victims).masked_fill(may_go, -1))
        self.free_slots = victims if all(is_full) else None
        self.row_held = [min(held, kept) for held, kept in zip(self.row_held, self.row_kept, strict=True)]

    def _attend_dense_step(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Nothing was evicted so far: the model's own attention, and beside it the scores."""
        output = call.run()
        if self.budget.is_unlimited:
            return output
        key_mask = None if self.column_positions is None else self.column_tokens.positions >= 0
        with torch.no_grad():
            probabilities, _ = decode_probabilities(call.query, call.key, key_mask, **call.logit_arguments)
        self.scores[..., : self.length] += probabilities.sum(dim=2)
        if self.must_evict:
            self._keep_best(call.key, call.value, self.scores[..., : self.length], self.column_tokens)
        return output

    def _keep_best(self, key: torch.Tensor, value: torch.Tensor, scores: torch.Tensor, tokens: Tokens) -> None:
        """
        Keeps heavy hitters and recent tokens of a prompt, or of a decode step that is the first to exceed the budget.
        """
        max_kept = max(self.row_kept)
        priority = scores.masked_fill(tokens.positions >= self.next_position - self.num_recent, float("inf"))
        priority = priority.masked_fill(tokens.positions < 0, float("-inf"))
        indices = best_tokens(priority, self.per_row(self.row_kept).flatten(), max_kept)
        # What is held may be less than a fraction of all that was seen: there is room for it to grow.
        indices = torch.nn.functional.pad(indices, (0, max_kept - indices.shape[-1]), value=-1)
        self.free_slots = None
        self.scores = grown(gather_tokens(scores, indices).masked_fill(indices < 0, 0), max_kept, max_kept + 1, fill=0)
        self.keep(key, value, tokens, indices, num_free=self.num_spare_slots)

    def _write(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Stores the new token in the spare slot of each head."""
        slots = self.positions.argmin(dim=-1, keepdim=True) if self.free_slots is None else self.free_slots
        self._overwrite(slots, key_states, value_states)
        self.scores.scatter_(2, slots, 0.0)


def lowest_slots(scores: torch.Tensor, positions: torch.Tensor, is_protected: torch.Tensor) -> torch.Tensor:
    """
    The slot of the token to evict: the lowest score among tokens that are not protected, the oldest of equals.

    Args:
        scores (`torch.Tensor`): `(batch, heads, slots)`. Of scores that are NaN none is higher than the lowest.
        positions (`torch.Tensor`): `(batch, heads, slots)`, distinct among the tokens of a head.
        is_protected (`torch.Tensor`): bool `(batch, heads, slots)`. The slot of a head without any other token has no
            meaning.

    Returns:
        `torch.Tensor`: `(batch, heads, 1)` int64.
    """
    candidates = scores.masked_fill(is_protected, float("inf"))
    is_safe = (candidates > candidates.amin(dim=-1, keepdim=True)) | is_protected
    return positions.masked_fill(is_safe, torch.iinfo(positions.dtype).max).argmin(dim=-1, keepdim=True)


class H2OCache(CompressedCache):
    """
    Keeps, per KV head, the most recent tokens and those that got most attention so far (H2O,
    https://arxiv.org/abs/2306.14048).

    A layer holds `budget` tokens and one spare slot, however much is generated: `batch * kv_heads * (budget + 1) * (2
    * head_dim * itemsize + 8)` bytes. The prompt is read with full attention, so the first new token is exact.

    Args:
        config (`PreTrainedConfig` or `PreTrainedModel`): The config of the model, or the model itself.
        budget (`float`, `int` or `str`, defaults to 0.2): What each layer keeps: a fraction of the prompt, a number of
            tokens, or bytes for all layers that evict ("256MiB"). In later turns, a fraction is of all tokens seen.
            1.0 never evicts.
        heavy_ratio (`float`, defaults to 0.5): The share of the budget for heavy hitters. The recent window has the
            rest, at least one token. Larger values remember more of the distant past.

    Raises:
        ValueError: For a budget or ratio outside these ranges, or a model that cannot be compressed.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import H2OCache
    >>> import torch

    >>> config = LlamaConfig(
    ...     hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    ... )
    >>> model = LlamaForCausalLM(config)
    >>> cache = H2OCache(model.config, budget=16)
    >>> tokens = model.generate(torch.arange(40)[None], past_key_values=cache, max_new_tokens=8, eos_token_id=None)
    >>> cache.get_seq_length(), cache.num_kept_tokens()
    (47, [16, 16])

    ```
    """

    def __init__(
        self, config: PreTrainedConfig | PreTrainedModel, budget: float | int | str = 0.2, heavy_ratio: float = 0.5
    ) -> None:
        config, _ = config_and_model(config)
        parsed_budget = parse_budget(budget)
        if not is_number(heavy_ratio) or not 0 <= heavy_ratio < 1:
            raise ValueError(
                f"`heavy_ratio={heavy_ratio!r}` must be at least 0 and less than 1: the rest of the budget is the "
                "recent window."
            )
        heavy_ratio = float(heavy_ratio)

        def build_layer(place: LayerPlace, masks: MaskReader) -> H2OLayer:
            return H2OLayer(place, parsed_budget, masks, heavy_ratio)

        super().__init__(config, build_layer, {"budget": budget, "heavy_ratio": heavy_ratio})
