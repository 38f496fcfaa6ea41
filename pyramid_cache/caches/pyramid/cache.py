"""
PyramidInfer of Yang et al., 2024 (https://arxiv.org/abs/2405.12532).

The queries of the last tokens agree on which earlier tokens matter: the *pivotal context*. Each layer keeps only the
keys and values of its pivotal context, and deeper layers keep less of it (paper, Algorithm 1). With a model instead of
a config, hidden states are pruned too, while the prompt is read: the layers above do not compute a token that a layer
dropped. Projections, attention and MLP all shrink.

Departures from the authors' code, whose legacy file is the reference for decoding:
- the budget is met exactly: the falling schedule is solved for its mean, and `min_context_length` never stops it
  early. Their settings, which fix the schedule and not the budget, are `PRESETS`;
- a layer prunes its own keys and values, as in the paper. Their code prunes for the next layer only;
- the recent window has at most `window_size` tokens, and scores are averaged over neighbours. Presets do neither;
- decoding is bounded: generated tokens are scored as the others are, and as many are evicted;
- padding is never kept. Attention sinks are the first tokens instead of the first columns.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import Unpack

from pyramid_cache.caches.h2o import WindowState
from pyramid_cache.caches.pyramid.prefill import PrunedPrefill
from pyramid_cache.engine.arguments import check_decoder_config
from pyramid_cache.engine.beside import StatesBeside
from pyramid_cache.engine.budget import (
    Budget,
    cosine_decay,
    floor_of_product,
    parse_budget,
    pyramid_schedule,
    read_count,
    read_number,
)
from pyramid_cache.engine.cache import config_and_model
from pyramid_cache.engine.policy import Policy, ScoringView, kernel_setting, setting
from pyramid_cache.engine.policy_cache import EvictionOptions, PolicyCache
from pyramid_cache.ops.transfer import numbers_on


# The authors' settings (configs/*.json): how far the cosine falls, and every how many layers tokens are dropped.
PRESETS = {
    "llama-2-7b": (0.9, 1),
    "llama-2-13b": (0.8, 2),
    "llama-2-70b": (0.9, 3),
    "llama-3-8b": (0.9, 1),
    "llama-3-70b": (0.9, 3),
}
DEFAULT_BUDGET = 0.4


@dataclass(frozen=True)
class PyramidPolicy(Policy):
    """A token's score is the attention of the recent window to it and its neighbours. See `PyramidCache`."""

    preset: str | None = None
    recent_ratio: float = setting(0.125, read_number, "[0, 1)")
    window_size: int = setting(64, read_count, 1)
    kernel_size: int = kernel_setting(13)
    num_sink_tokens: int = setting(4, read_count, 0)
    min_context_length: int = setting(64, read_count, 0)
    distance_weight: float = setting(1.0, read_number, "(0, 1e28]")  # scores sum up to 2^31 queries' in float32
    decay_ratio: float = setting(0.6, read_number, "(0, 1]")
    first_pruned_layer: int = setting(0, read_count, 0)
    prefill_depth: float = setting(2 / 3, read_number, "[0, 1]")

    heads_share_tokens = True
    state_class = WindowState

    def __post_init__(self) -> None:
        if self.preset is not None and (not isinstance(self.preset, str) or self.preset not in PRESETS):
            raise ValueError(f"`preset={self.preset!r}` is unknown: choose one of {sorted(PRESETS)}, or a `budget`.")
        super().__post_init__()

    @property
    def newest_weight(self) -> float:  # type: ignore[override]
        return self.distance_weight

    def score(self, view: ScoringView) -> torch.Tensor:
        is_recent = view.positions >= view.length - view.state.num_recent
        # The window looks at itself most: its neighbours would be kept for that alone.
        always_stays = is_recent | view.is_first(self.num_sink_tokens)
        scores = view.pool(view.attention.masked_fill(always_stays, 0), self.kernel_size)
        return scores.masked_fill(always_stays, float("inf"))

    def prepare(self, state: WindowState) -> None:
        state.num_recent = numbers_on(state.next_position.device, state.row_windows, torch.int32).view(-1, 1, 1)

    def num_queries(self, prompt_length: int, budget: Budget, num_layers: int) -> int:
        """`R + 1` of the paper: the tokens of the recent window. Without a preset, half of the budget at most."""
        recent = floor_of_product(self.recent_ratio, prompt_length)
        if self.preset is None:
            mean = self.mean_kept(prompt_length, budget, num_layers)
            recent = min(recent, self.window_size - 1, (mean - 1) // 2)
        return max(min(recent, prompt_length - 1), 0) + 1

    def num_tokens(self, prompt_length: int, budget: Budget, depth: int, num_layers: int) -> int:
        if prompt_length == 0:
            return 1
        kept = self.schedule(prompt_length, budget, num_layers)[depth]
        # A prompt within a budget of tokens may grow up to it before anything is dropped.
        is_whole = self.preset is None and budget.kind == "tokens" and kept == prompt_length
        return max(kept, budget.num_tokens(prompt_length)) if is_whole else kept

    def schedule(self, prompt_length: int, budget: Budget, num_layers: int) -> tuple[int, ...]:
        """The tokens that each layer keeps of a prompt."""
        recent = self.num_queries(prompt_length, budget, num_layers)
        if self.preset is not None:
            return preset_schedule(self.preset, prompt_length, num_layers, recent, self.min_context_length)
        mean = self.mean_kept(prompt_length, budget, num_layers)
        sinks = min(self.num_sink_tokens, mean - recent)
        context = min(self.min_context_length, (mean - recent - sinks) // 2)
        total, shape = self.total_kept(prompt_length, budget, num_layers), cosine_decay(num_layers, self.decay_ratio)
        return pyramid_schedule(prompt_length, total, tuple(shape), recent + sinks + context, self.first_pruned_layer)

    def total_kept(self, prompt_length: int, budget: Budget, num_layers: int) -> int:
        """The tokens that all layers together keep."""
        if budget.kind != "fraction":
            return num_layers * min(budget.num_tokens(prompt_length), prompt_length)
        # Rounded rather than floored: a single layer of a short prompt would miss its share by percents.
        total = (floor_of_product(budget.amount, 2 * prompt_length * num_layers) + 1) // 2
        return max(total, self.first_pruned_layer * prompt_length + num_layers - self.first_pruned_layer)

    def mean_kept(self, prompt_length: int, budget: Budget, num_layers: int) -> int:
        """The tokens that the layers which are pruned keep on average: at least one."""
        rest = self.total_kept(prompt_length, budget, num_layers) - self.first_pruned_layer * prompt_length
        return max(rest // (num_layers - self.first_pruned_layer), 1)

    def check(self, budget: Budget, num_layers: int) -> None:
        """Raises ValueError unless the budget has room for what always stays."""
        if self.first_pruned_layer >= num_layers:
            raise ValueError(
                f"`first_pruned_layer={self.first_pruned_layer}` leaves nothing to prune in {num_layers} layers."
            )
        least, share = self.num_sink_tokens + 1, self.first_pruned_layer / num_layers
        if budget.kind == "tokens" and budget.amount < least:
            raise ValueError(
                f"`budget={budget.amount}` tokens cannot hold the {self.num_sink_tokens} sink tokens and a recent "
                f"one. Give at least {least}, or lower `num_sink_tokens`."
            )
        if budget.kind == "fraction" and share >= budget.amount:
            raise ValueError(
                f"`budget={budget.amount}` is spent on the {self.first_pruned_layer} of {num_layers} layers that keep "
                f"everything (`first_pruned_layer`). Give more than {share:.3g}, or let fewer layers keep everything."
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
        ratio = (1 - decay_ratio) * (math.cos(math.pi * layer / num_layers) + 1) / 2 + decay_ratio
        if layer % interval == 0 and int(context * ratio) > min_context_length:
            context = int(context * ratio)
        held.append(context + num_recent)
    return tuple(held)


class PyramidCache(PolicyCache):
    """
    Keeps each layer's pivotal context, less of it the deeper the layer (PyramidInfer,
    https://arxiv.org/abs/2405.12532).

    Of a prompt, the cache holds `budget * num_layers * batch * prompt * (2 * kv_heads * head_dim * itemsize + 8)`
    bytes, and while an answer is generated up to `eviction_interval` tokens more in each layer. See `PolicyCache` for
    the other arguments.

    Args:
        config (`PreTrainedConfig` or `PreTrainedModel`): With the config of a model, each layer reads the whole
            prompt, then prunes its own keys and values. With the model itself, the upper layers (see `prefill_depth`)
            do not compute the tokens that a layer below drops, so that prompts are read faster. The logits of dropped
            prompt tokens are then NaN. The last token, whose logits `generate` needs, is never dropped.
        budget (`float`, `int` or `str`, defaults to 0.4): The mean over layers of what is kept: a fraction of the
            prompt, a number of tokens, or bytes ("256MiB"), of which rows of different length may take some more. 1.0
            never evicts.
        preset (`str`, *optional*): The authors' settings for a model, instead of a budget: "llama-2-7b",
            "llama-2-13b", "llama-2-70b", "llama-3-8b" or "llama-3-70b".
        recent_ratio (`float`, *optional*): The recent window's share of the prompt. The window always stays, and its
            queries choose the rest. 0.125 by default, and never more than half of the budget; 0.2 with a preset.
        window_size (`int`, defaults to 64): The most tokens that the recent window has, unless there is a preset.
            Larger values cover a longer question, and leave less room.
        kernel_size (`int`, *optional*): Over how many neighbouring tokens scores are averaged. Odd. Larger values keep
            fewer and longer passages. 13 by default; 1, which scores each token alone, with a preset.
        num_sink_tokens (`int`, defaults to 4): Tokens at the start that always stay, if the budget has room for them.
        min_context_length (`int`, defaults to 64): Tokens beside window and sinks that every layer keeps, if the
            budget allows it.
        distance_weight (`float`, *optional*): How much more the newest query of the window counts than the oldest. 1.0
            by default, 1.2 with a preset.
        decay_ratio (`float`, defaults to 0.6): What the last layer keeps relative to the first, before the bounds
            apply. Smaller values take more from deep layers.
        first_pruned_layer (`int`, defaults to 0): Layers before this one keep everything, and the others less.
            Attention settles after the first layers, so that later pruning recalls more of a long prompt.
        prefill_depth (`float`, *optional*): With a model, the share of its layers that compute the whole prompt,
            though each prunes its own keys and values. Smaller values read prompts faster, and find less. Two thirds
            by default; 0, as in the paper, with a preset.

    Raises:
        ValueError: For values outside these ranges, or a number of tokens without room for sinks and a recent token.
        NotImplementedError: For a model whose hidden states cannot be pruned. Give its config instead.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import PyramidCache
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> cache = PyramidCache(model, budget=0.5)
    >>> tokens = model.generate(torch.arange(40)[None], past_key_values=cache, max_new_tokens=1, eos_token_id=None)
    >>> cache.num_kept_tokens()
    [25, 15]

    ```
    """

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        budget: float | int | str = DEFAULT_BUDGET,
        *,
        preset: str | None = None,
        recent_ratio: float | None = None,
        window_size: int = 64,
        kernel_size: int | None = None,
        num_sink_tokens: int = 4,
        min_context_length: int = 64,
        distance_weight: float | None = None,
        decay_ratio: float = 0.6,
        first_pruned_layer: int = 0,
        prefill_depth: float | None = None,
        **options: Unpack[EvictionOptions],
    ) -> None:
        config, model = config_and_model(config)
        check_decoder_config(config)
        parsed_budget = parse_budget(budget)
        if preset is not None and budget != DEFAULT_BUDGET:
            raise ValueError(f"`preset={preset!r}` and `budget={budget!r}` exclude each other: give one of them.")
        # What is not given is the paper's with a preset.
        defaults = (0.125, 13, 1.0, 2 / 3) if preset is None else (0.2, 1, 1.2, 0.0)
        given = zip((recent_ratio, kernel_size, distance_weight, prefill_depth), defaults, strict=True)
        chosen: list[Any] = [default if value is None else value for value, default in given]
        recent_ratio, kernel_size, distance_weight, prefill_depth = chosen
        window = preset, recent_ratio, window_size, kernel_size
        shape = distance_weight, decay_ratio, first_pruned_layer, prefill_depth
        policy = PyramidPolicy(*window, num_sink_tokens, min_context_length, *shape)
        prunes = model is not None and not parsed_budget.is_unlimited
        masks = PrunedPrefill(model, policy.prefill_depth) if prunes else None
        super().__init__(config, budget, policy, **options, masks=masks)
        places = [layer.place for layer in self.compressed_layers]
        has_others = len(places) < len(self.layers) or any(isinstance(each, StatesBeside) for each in self.layers)
        if model is not None and has_others:
            raise NotImplementedError(
                f"{type(model).__name__} has layers of other kinds than full attention, whose hidden states cannot be "
                "pruned. Build the cache from `model.config`: each full-attention layer then prunes its own keys and "
                "values."
            )
        if preset is None and not parsed_budget.is_unlimited:
            policy.check(parsed_budget, len(places))

    def reset(self) -> None:
        super().reset()
        if isinstance(self.masks, PrunedPrefill):
            self.masks.finish()
