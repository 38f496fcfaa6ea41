"""
PyramidInfer of Yang et al., 2024 (https://arxiv.org/abs/2405.12532).

The queries of the last tokens agree on which earlier tokens matter: the *pivotal context*. Each layer keeps only the
keys and values of its pivotal context, and deeper layers keep less of it (paper, Algorithm 1). With a model instead of
a config, hidden states are pruned too, while the prompt is read: the layers above do not compute a token that a layer
dropped. Projections, attention and MLP all shrink.

Departures from the authors' code, whose legacy file is the reference for decoding:
- the budget is met exactly: the falling schedule is solved for its mean, and `min_context_length` never stops it
  early. Their settings, which fix the schedule and not the budget, are `PRESETS`;
- a layer prunes its own keys and values, as in the paper. Their code prunes for the next layer only
  (`prune_own_layer=False`);
- the recent window is fixed when the prompt is read. It does not grow with the answer, so that each generated token is
  judged once, by the same number of queries;
- padding is never kept. Attention sinks are the first tokens instead of the first columns.
"""

import functools
import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pyramid_cache.engine.arguments import check_decoder_config
from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.budget import (
    Budget,
    cosine_decay,
    floor_of_product,
    is_number,
    parse_budget,
    pyramid_schedule,
    read_count,
)
from pyramid_cache.engine.cache import CompressedCache, config_and_model
from pyramid_cache.engine.layer import CompressedLayer, LayerPlace
from pyramid_cache.engine.prefill import PrunedPrefill
from pyramid_cache.engine.scoring import attend_and_score
from pyramid_cache.engine.selection import best_tokens, gather_tokens
from pyramid_cache.engine.tokens import MaskReader, Tokens
from pyramid_cache.ops import decode_attention


# The authors' settings (configs/*.json): how far the cosine falls, and every how many layers tokens are dropped.
PRESETS = {
    "llama-2-7b": (0.9, 1),
    "llama-2-13b": (0.8, 2),
    "llama-2-70b": (0.9, 3),
    "llama-3-8b": (0.9, 1),
    "llama-3-70b": (0.9, 3),
}
DEFAULT_BUDGET = 0.4
# Generated tokens are judged in zones of this many; what stays of them falls with depth (authors' configs:
# exceed_length, gen_compress_ratio, gen_decay_ratio).
ZONE_LENGTH = 16
GENERATED_RATIO = 0.9
GENERATED_DECAY_RATIO = 0.1
# Scores are float32 sums of up to 2^31 queries' weights.
MAX_DISTANCE_WEIGHT = 1e28


@dataclass(frozen=True)
class PyramidSettings:
    """
    How many tokens each layer keeps of a prompt. See `PyramidCache` for the fields.
    """

    num_layers: int
    budget: Budget
    preset: str | None = None
    recent_ratio: float = 0.2
    num_sink_tokens: int = 4
    min_context_length: int = 64
    distance_weight: float = 1.2
    decay_ratio: float = 0.3
    first_pruned_layer: int = 0
    prune_own_layer: bool = True

    def __post_init__(self) -> None:
        if self.preset is not None and (not isinstance(self.preset, str) or self.preset not in PRESETS):
            raise ValueError(
                f"`preset={self.preset!r}` is unknown. Choose one of {sorted(PRESETS)}, or give a `budget`."
            )
        if not is_number(self.decay_ratio) or not 0 < self.decay_ratio <= 1:
            raise ValueError(f"`decay_ratio={self.decay_ratio!r}` must be greater than 0 and at most 1.")
        if not is_number(self.distance_weight) or not 0 < self.distance_weight <= MAX_DISTANCE_WEIGHT:
            raise ValueError(
                f"`distance_weight={self.distance_weight!r}` must be a positive number of at most "
                f"{MAX_DISTANCE_WEIGHT:g}."
            )
        if not isinstance(self.prune_own_layer, bool):
            raise ValueError(f"`prune_own_layer={self.prune_own_layer!r}` must be True or False.")
        for name in ("num_sink_tokens", "min_context_length", "first_pruned_layer"):
            object.__setattr__(self, name, read_count(name, getattr(self, name), least=0))
        for name in ("recent_ratio", "decay_ratio", "distance_weight"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.first_pruned_layer >= self.num_layers:
            raise ValueError(
                f"`first_pruned_layer={self.first_pruned_layer}` leaves nothing to prune in {self.num_layers} layers."
            )
        if self.preset is not None:
            return
        budget, least = self.budget.amount, self.num_sink_tokens + 1
        if self.budget.kind == "tokens" and budget < least:
            raise ValueError(
                f"`budget={budget}` tokens cannot hold the {self.num_sink_tokens} sink tokens and a recent one. Give "
                f"at least {least}, or lower `num_sink_tokens`."
            )
        if self.budget.kind == "fraction" and budget < 1:
            share = self.num_dense_layers / self.num_layers
            if share >= budget:
                raise ValueError(
                    f"`budget={budget}` is spent on the {self.num_dense_layers} of {self.num_layers} layers that keep "
                    f"everything (`first_pruned_layer={self.first_pruned_layer}`, "
                    f"`prune_own_layer={self.prune_own_layer}`). Give more than {share:.3g}, or let fewer layers keep "
                    "everything."
                )

    @property
    def num_dense_layers(self) -> int:
        """The first layers, which keep everything: where only the layers above are pruned, one more."""
        return min(self.first_pruned_layer + (not self.prune_own_layer), self.num_layers)

    @property
    def is_unlimited(self) -> bool:
        """Whether nothing is ever evicted."""
        return self.budget.is_unlimited and self.preset is None

    def total_kept(self, prompt_length: int, budget: Budget) -> int:
        """The tokens that all layers together keep."""
        if budget.kind != "fraction":
            return self.num_layers * min(budget.num_tokens(prompt_length), prompt_length)
        # Rounded rather than floored: a single layer of a short prompt would miss its share by percents.
        total = (floor_of_product(budget.amount, 2 * prompt_length * self.num_layers) + 1) // 2
        return max(total, self.num_dense_layers * prompt_length + self.num_layers - self.num_dense_layers)

    def mean_kept(self, prompt_length: int, budget: Budget) -> int:
        """The tokens that the layers which are pruned keep on average: at least one."""
        if self.num_dense_layers == self.num_layers:
            return prompt_length
        rest = self.total_kept(prompt_length, budget) - self.num_dense_layers * prompt_length
        return max(rest // (self.num_layers - self.num_dense_layers), 1)

    def num_recent(self, prompt_length: int, budget: Budget) -> int:
        """`R + 1`: the tokens of the recent window, whose queries are asked. Half of the budget at most."""
        recent = floor_of_product(self.recent_ratio, prompt_length)
        if self.preset is None:
            recent = min(recent, (self.mean_kept(prompt_length, budget) - 1) // 2)
        return min(recent, prompt_length - 1) + 1

    def num_kept(self, prompt_length: int, budget: Budget) -> tuple[int, ...]:
        """The tokens that each layer keeps."""
        if self.preset is not None:
            return preset_schedule(
                self.preset,
                prompt_length,
                self.num_layers,
                self.num_recent(prompt_length, budget),
                self.min_context_length,
            )
        mean = self.mean_kept(prompt_length, budget)
        recent = self.num_recent(prompt_length, budget)
        sinks = min(self.num_sink_tokens, mean - recent)
        context = min(self.min_context_length, (mean - recent - sinks) // 2)
        return pyramid_schedule(
            prompt_length,
            self.total_kept(prompt_length, budget),
            tuple(cosine_decay(self.num_layers, self.decay_ratio)),
            recent + sinks + context,
            self.num_dense_layers,
        )


@functools.lru_cache(maxsize=1024)
def preset_schedule(
    preset: str, prompt_length: int, num_layers: int, num_recent: int, min_context_length: int
) -> tuple[int, ...]:
    """
    The tokens that each layer holds by the authors' arithmetic: every `interval` layers the context shrinks by a
    factor that itself falls with depth, until it would be no longer than `min_context_length`.
    """
    decay_ratio, interval = PRESETS[preset]
    context = prompt_length - num_recent
    min_context_length = min(min_context_length, context)
    held = []
    for layer in range(num_layers):
        held.append(context + num_recent)
        ratio = (1 - decay_ratio) * (math.cos(math.pi * layer / num_layers) + 1) / 2 + decay_ratio
        if layer % interval == 0 and int(context * ratio) > min_context_length:
            context = int(context * ratio)
    return tuple(held)


def num_kept_of_zone(layer_idx: int, num_layers: int) -> int:
    """How many of `ZONE_LENGTH` generated tokens a layer keeps: 14 in the first layer, 1 in the last (of many)."""
    ratio = (1 - GENERATED_DECAY_RATIO) * (math.cos(math.pi * layer_idx / num_layers) + 1) / 2 + GENERATED_DECAY_RATIO
    return max(int(ZONE_LENGTH * GENERATED_RATIO * ratio), 1)


class PyramidLayer(CompressedLayer):
    """
    One layer of `PyramidCache`. All heads keep the same tokens. Slots are `[prompt | generated]`; the generated ones
    from slot `num_settled` on are not judged yet in some row, and `scores` `(batch, 1, slots from there)` float32 is
    their sum of weighted attention probabilities.
    """

    scores: torch.Tensor | None

    row_tensors = ("next_position", "column_positions", "scores", "prompt_length", "num_recent")
    row_counts = ("row_lengths", "row_held", "row_kept", "row_prompt_lengths", "row_recent", "row_zones", "row_front")
    state_numbers = (*CompressedLayer.state_numbers, "num_settled")

    def __init__(
        self, place: LayerPlace, masks: MaskReader, settings: PyramidSettings, prefill: PrunedPrefill | None
    ) -> None:
        self.settings = settings
        self.prefill = prefill
        super().__init__(place, settings.budget, masks)

    def _clear(self) -> None:
        super()._clear()
        self.num_settled = 0
        # Per row: prompt tokens, size of the recent window, zones judged, tokens in the slots before `num_settled`.
        self.row_prompt_lengths: list[int] = []
        self.row_recent: list[int] = []
        self.row_zones: list[int] = []
        self.row_front: list[int] = []
        # Columns of the last prompt that were kept: what the next layer computes when hidden states are pruned.
        self.passed_on: torch.Tensor | None = None

    # The sizes change with every zone of an answer: compilers would make a graph for each.
    update = torch.compiler.disable(CompressedLayer.update)
    attend = torch.compiler.disable(CompressedLayer.attend)

    def num_tokens_to_keep(self, row_length: int) -> int:
        if self.settings.is_unlimited or row_length == 0:
            return max(row_length, 1)
        kept = self.settings.num_kept(row_length, self.token_budget)[self.place.depth]
        # A prompt within a budget of tokens may grow up to it before anything is dropped.
        is_whole = self.token_budget.kind == "tokens" and kept == row_length
        return (
            max(kept, self.token_budget.num_tokens(row_length)) if is_whole and self.settings.preset is None else kept
        )

    # The prompt.

    def attend_prompt(self, call: AttentionCall, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        is_first = self.positions is None and self.length == call.num_keys == call.num_queries
        if self.prefill is not None and is_first and self.replayed is None:
            self.prefill.require_running()
        is_whole = self.positions is None and self.incoming is None and not self.must_evict
        row_passed = self._row_passed(tokens)
        if is_whole and row_passed is None:
            return call.run()
        if self.positions is not None:
            call = self.with_slot_mask(call, tokens.positions >= 0 if tokens.has_gaps else None)
        self._start_generation(self.row_lengths)
        if self.must_evict or row_passed is not None:
            # Padding between the tokens of a row puts its recent window further back.
            num_rows = min(max(self.row_recent), call.num_queries) if tokens.is_ascending else call.num_queries
            weights = self._row_weights(tokens.positions[:, 0, -num_rows:])
            output, scores = attend_and_score(call, tokens, num_rows, weights)
        else:
            output = call.run()
            scores = torch.zeros(tokens.positions.shape, dtype=torch.float32, device=self.device)
        if row_passed is not None:
            self.passed_on = self._best_tokens(scores, tokens, row_passed)
        if not is_whole:
            is_same = row_passed is not None and self.settings.prune_own_layer
            indices = self.passed_on if is_same else self._best_tokens(scores, tokens, self.row_kept)
            self.keep(call.key, call.value, tokens, indices)
            self.num_settled, self.row_front = self.length, list(self.row_held)
        return output

    def _row_passed(self, tokens: Tokens) -> list[int] | None:
        """How many tokens of each row the next layer will compute, where that is not all that this one did."""
        place = self.place
        if self.prefill is None or not self.prefill.is_running or place.depth + 1 == place.num_layers:
            return None
        depth = place.depth if self.settings.prune_own_layer else place.depth + 1
        row_passed = [
            self.settings.num_kept(length, self.token_budget)[depth] if length else 0 for length in tokens.row_lengths
        ]
        is_fewer = any(passed < present for passed, present in zip(row_passed, tokens.row_present, strict=True))
        return row_passed if is_fewer else None

    def _best_tokens(self, scores: torch.Tensor, tokens: Tokens, row_kept: list[int]) -> torch.Tensor:
        """
        `(batch, 1, kept)`: the columns of the sinks, of the recent window and of the best of the context between.
        """
        is_protected = (tokens.positions < self.settings.num_sink_tokens) | (
            tokens.positions >= self.next_position - self.num_recent
        )
        priority = scores.mean(dim=1, keepdim=True).masked_fill(is_protected, float("inf"))
        priority = priority.masked_fill(tokens.positions < 0, float("-inf"))
        max_kept = max(min(present, kept) for present, kept in zip(tokens.row_present, row_kept, strict=True))
        return best_tokens(priority, self.per_row(row_kept).flatten(), max_kept)

    def _row_weights(self, positions: torch.Tensor) -> torch.Tensor:
        """
        How much each query `(batch, rows)` counts: from 1 at the start of the window to `distance_weight`, 0 before.
        """
        window_start = (self.next_position - self.num_recent)[:, 0]
        slope = (self.settings.distance_weight - 1) / (self.num_recent[:, 0] - 1).clamp(min=1).float()
        return torch.where(positions >= window_start, 1 + slope * (positions - window_start), 0.0)

    # Generated tokens.

    def _start_generation(self, row_lengths: list[int]) -> None:
        """
        What comes behind prompts of these lengths is generated; one within a budget of tokens first grows up to it.
        """
        self.row_prompt_lengths = [max(length, kept) for length, kept in zip(row_lengths, self.row_kept, strict=True)]
        self.row_recent = [self.settings.num_recent(length, self.token_budget) for length in self.row_prompt_lengths]
        self.prompt_length, self.num_recent = self.per_row(self.row_prompt_lengths), self.per_row(self.row_recent)
        self.row_zones = [0] * self.batch_size
        self.scores = None

    def attend_step(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.positions is None:
            dense = call.run()
            if self.must_evict and not self.settings.is_unlimited:
                self._turn_into_slots(call.key, call.value)
            return dense
        output, _, probabilities = decode_attention(
            call.query, call.key, call.value, mask=self.slot_mask(), **call.logit_arguments
        )
        self._score_generated(probabilities.detach())
        self._judge_zones()
        return output, None

    def _turn_into_slots(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """
        A layer that kept its whole prompt starts to judge what is generated: its first token beyond the budget is
        here.
        """
        tokens = self.column_tokens
        # The prompt ended where the budget does, one token ago.
        self._start_generation([length - 1 for length in self.row_lengths])
        row_kept, self.row_kept = self.row_kept, list(self.row_held)
        self.keep(
            key, value, tokens, self._best_tokens(torch.zeros_like(tokens.positions).float(), tokens, self.row_held)
        )
        self.row_kept = row_kept
        settled = [min(held, prompt) for held, prompt in zip(self.row_held, self.row_prompt_lengths, strict=True)]
        self.num_settled = min(settled)
        self.row_front = [self.num_settled] * self.batch_size

    def _score_generated(self, probabilities: torch.Tensor) -> None:
        """
        Adds up what this query attended to, for the generated tokens in whose window it is: those followed by the end
        of their zone and less than a recent window since. `probabilities` is `(batch, kv_heads, slots)`.
        """
        num_open = self.length - self.num_settled
        if self.scores is None or self.scores.shape[-1] < num_open:
            scores = torch.zeros(self.batch_size, 1, num_open + ZONE_LENGTH, dtype=torch.float32, device=self.device)
            if self.scores is not None:
                scores[..., : self.scores.shape[-1]] = self.scores
            self.scores = scores
        generated = self.positions[..., self.num_settled : self.length] - self.prompt_length
        zone_end = (generated // ZONE_LENGTH + 1) * ZONE_LENGTH
        distance = self.next_position - 1 - self.prompt_length - zone_end
        in_window = (generated >= 0) & (distance >= 0) & (distance < self.num_recent)
        slope = (self.settings.distance_weight - 1) / (self.num_recent - 1).clamp(min=1)
        weights = torch.where(in_window, 1 + slope * distance, 0.0)
        attended = probabilities[..., self.num_settled :].mean(dim=1, keepdim=True)
        self.scores[..., :num_open] += weights * attended

    def _judge_zones(self) -> None:
        """In the rows where a zone has got a whole recent window behind it, keeps the best of its tokens."""
        generated = [length - prompt for length, prompt in zip(self.row_lengths, self.row_prompt_lengths, strict=True)]
        is_due = [
            count >= (zones + 1) * ZONE_LENGTH + recent
            for count, zones, recent in zip(generated, self.row_zones, self.row_recent, strict=True)
        ]
        if not any(is_due):
            return
        num_dropped = ZONE_LENGTH - num_kept_of_zone(self.place.depth, self.place.num_layers)
        start, num_open = self.num_settled, self.length - self.num_settled
        positions = self.positions[..., start : self.length]
        zone_start = self.prompt_length + ZONE_LENGTH * self.per_row(self.row_zones)
        in_zone = (positions >= zone_start) & (positions < zone_start + ZONE_LENGTH) & self.per_row(is_due).bool()
        priority = self.scores[..., :num_open].masked_fill(~in_zone, float("inf"))
        priority = priority.masked_fill(positions < 0, float("-inf"))
        self.row_held = [held - num_dropped * due for held, due in zip(self.row_held, is_due, strict=True)]
        row_open = [held - front for held, front in zip(self.row_held, self.row_front, strict=True)]
        indices = best_tokens(priority, self.per_row(row_open).flatten(), max(row_open))
        self._replace_open_slots(indices)
        self.row_zones = [zones + due for zones, due in zip(self.row_zones, is_due, strict=True)]
        # What all rows have judged will not be looked at again.
        row_unjudged = [
            max(count - zones * ZONE_LENGTH, 0) for count, zones in zip(generated, self.row_zones, strict=True)
        ]
        shift = min(count - unjudged for count, unjudged in zip(row_open, row_unjudged, strict=True))
        self.num_settled += shift
        self.row_front = [front + shift for front in self.row_front]
        self.scores = self.scores[..., shift:].contiguous()

    def _replace_open_slots(self, indices: torch.Tensor) -> None:
        """
        Closes the gaps: the slots from `num_settled` on become those at `indices` `(batch, 1, slots)` among them.
        """
        start, num_open, num_kept = self.num_settled, self.length - self.num_settled, indices.shape[-1]
        kept = {
            name: gather_tokens(getattr(self, name)[:, :, start : self.length], indices) for name in self.slot_tensors
        }
        self._spare_autograd()
        for name, tensor in kept.items():
            getattr(self, name)[:, :, start : start + num_kept] = tensor
        self.positions[..., start : start + num_kept].masked_fill_(indices < 0, -1)
        kept_scores = gather_tokens(self.scores[..., :num_open], indices)
        self.scores.zero_()
        self.scores[..., :num_kept] = kept_scores
        self.length = start + num_kept

    @property
    def score_label(self) -> str:
        return "attention of the recent window (weighted sum of probabilities)"

    def _slot_scores(self) -> torch.Tensor | None:
        """Of generated tokens, until they are judged: the scores of a prompt are gone when it has been read."""
        if self.scores is None:
            return None
        positions = self.positions[..., : self.length]
        result = torch.full(positions.shape, torch.nan, dtype=torch.float32, device=self.device)
        result[..., self.num_settled :] = self.scores[..., : self.length - self.num_settled]
        first_unjudged = self.prompt_length + ZONE_LENGTH * self.per_row(self.row_zones)
        return result.masked_fill(positions < first_unjudged, torch.nan)


class PyramidCache(CompressedCache):
    """
    Keeps each layer's pivotal context, less of it the deeper the layer (PyramidInfer,
    https://arxiv.org/abs/2405.12532).

    Of a prompt, the cache holds `budget * num_layers * batch * prompt * kv_heads * 2 * head_dim * itemsize` bytes. Of
    the generated tokens, the first layer keeps nine tenths and the last one a sixteenth, once they leave the recent
    window. Slots for them are added 16 at a time.

    Args:
        config (`PreTrainedConfig` or `PreTrainedModel`): With the config of a model, each layer reads the whole
            prompt, then prunes its own keys and values. With the model itself, the layers above do not compute the
            tokens that a layer drops, so that prompts are read faster. The logits of dropped prompt tokens are then
            NaN. The last token, whose logits `generate` needs, is never dropped.
        budget (`float`, `int` or `str`, defaults to 0.4): The mean over layers of what is kept of the prompt: a
            fraction, a number of tokens, or bytes ("256MiB"). In later turns, a fraction is of all tokens seen. What
            is kept of the answer comes on top. 1.0 never evicts.
        preset (`str`, *optional*): The authors' settings for a model, instead of a budget: "llama-2-7b",
            "llama-2-13b", "llama-2-70b", "llama-3-8b" or "llama-3-70b".
        recent_ratio (`float`, *optional*): The recent window's share of the prompt. The window always stays, and its
            queries choose the rest. 0.2 by default, and never more than half of the budget.
        num_sink_tokens (`int`, defaults to 4): Tokens at the start that always stay, if the budget has room for them.
        min_context_length (`int`, defaults to 64): Tokens beside window and sinks that every layer keeps, if the
            budget allows it.
        distance_weight (`float`, defaults to 1.2): How much more the newest query of the window counts than the
            oldest.
        decay_ratio (`float`, defaults to 0.3): What the last layer keeps relative to the first, before the bounds
            apply. Smaller values take more from deep layers.
        first_pruned_layer (`int`, defaults to 0): Layers before this one keep everything, and the others less.
            Attention settles after the first layers, so that later pruning recalls more of a long prompt.
        prune_own_layer (`bool`, *optional*): With `False`, a layer's selection applies to the layers above it only,
            and the first pruned layer keeps everything. The authors' code does this. It is the default with a preset.

    Raises:
        ValueError: For values outside these ranges, or a number of tokens without room for sinks and a recent token.
        NotImplementedError: For a model whose hidden states cannot be pruned. Give its config instead.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import PyramidCache
    >>> import torch

    >>> config = LlamaConfig(
    ...     hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    ... )
    >>> model = LlamaForCausalLM(config)
    >>> cache = PyramidCache(model, budget=0.5)
    >>> tokens = model.generate(torch.arange(40)[None], past_key_values=cache, max_new_tokens=1, eos_token_id=None)
    >>> cache.num_kept_tokens()
    [24, 16]

    ```
    """

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        budget: float | int | str = DEFAULT_BUDGET,
        *,
        preset: str | None = None,
        recent_ratio: float | None = None,
        num_sink_tokens: int = 4,
        min_context_length: int = 64,
        distance_weight: float = 1.2,
        decay_ratio: float = 0.3,
        first_pruned_layer: int = 0,
        prune_own_layer: bool | None = None,
    ) -> None:
        config, model = config_and_model(config)
        parsed_budget = parse_budget(budget)
        if preset is not None and budget != DEFAULT_BUDGET:
            raise ValueError(f"`preset={preset!r}` and `budget={budget!r}` exclude each other: give one of them.")
        if recent_ratio is not None and (not is_number(recent_ratio) or not 0 <= recent_ratio < 1):
            raise ValueError(f"`recent_ratio={recent_ratio!r}` must be at least 0 and less than 1.")
        if recent_ratio is not None and parsed_budget.kind == "fraction" and not recent_ratio < parsed_budget.amount:
            raise ValueError(
                f"`budget={budget}` cannot hold a recent window of `recent_ratio={recent_ratio}` and sinks. Raise the "
                "budget or lower `recent_ratio`."
            )
        prune_own_layer = preset is None if prune_own_layer is None else prune_own_layer

        @functools.cache
        def build_settings(num_layers: int) -> PyramidSettings:
            return PyramidSettings(
                num_layers=num_layers,
                budget=parsed_budget,
                preset=preset,
                recent_ratio=0.2 if recent_ratio is None else recent_ratio,
                num_sink_tokens=num_sink_tokens,
                min_context_length=min_context_length,
                distance_weight=distance_weight,
                decay_ratio=decay_ratio,
                first_pruned_layer=first_pruned_layer,
                prune_own_layer=prune_own_layer,
            )

        check_decoder_config(config)
        self.pruned_prefill = None if model is None or parsed_budget.is_unlimited else PrunedPrefill(model)

        def build_layer(place: LayerPlace, masks: MaskReader) -> PyramidLayer:
            if self.pruned_prefill is not None and place.num_layers < place.model_depth:
                raise NotImplementedError(
                    f"{type(model).__name__} has layers of other kinds than full attention, whose hidden states "
                    "cannot be pruned. Build the cache from `model.config`: each full-attention layer then prunes "
                    "its own keys and values."
                )
            return PyramidLayer(place, masks, build_settings(place.num_layers), self.pruned_prefill)

        settings = {
            "budget": budget,
            "preset": preset,
            "recent_ratio": recent_ratio,
            "num_sink_tokens": num_sink_tokens,
            "min_context_length": min_context_length,
            "distance_weight": distance_weight,
            "decay_ratio": decay_ratio,
            "first_pruned_layer": first_pruned_layer,
            "prune_own_layer": prune_own_layer,
        }
        super().__init__(config, build_layer, settings)

    def reset(self) -> None:
        if self.pruned_prefill is not None:
            self.pruned_prefill.finish()
        super().reset()
