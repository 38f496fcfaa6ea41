"""
KVMerger of Wang et al., 2024 (https://arxiv.org/abs/2407.08454).

Neighbouring tokens have similar keys. Tokens that follow each other with a cosine above a threshold form a set, and a
set becomes one slot at the position of its pivot, the token with the most attention (paper, Section 4). Keys and
values are means weighed by a Gaussian of the distance from the pivot's key. Heavy and recent tokens stay as they are.

Departures from the paper: slots are held to a budget, so sets with little attention are evicted; the paper lets the
threshold decide how many there are. The width of the Gaussian is the root of the mean squared distance in the set. A
slot has the logarithm of the number of its tokens as its bias, so that it keeps their mass.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import Unpack

from pyramid_cache.engine.budget import read_number
from pyramid_cache.engine.compaction import Compactor, joined
from pyramid_cache.engine.policy import LayerView, Policy, PromptView, ScoringView, setting
from pyramid_cache.engine.policy_cache import EvictionOptions, PolicyCache
from pyramid_cache.engine.protection import is_protected
from pyramid_cache.engine.state import LayerState, slot


NO_PIVOT = -1


@dataclass(eq=False)
class SetState(LayerState):
    """`pivots` `(batch, kv_heads, slots)` int32: the position of the pivot of each token's set."""

    pivots: torch.Tensor | None = slot(fill=NO_PIVOT)


@dataclass(frozen=True)
class KVMergerPolicy(Policy):
    """Pivots of sets stay before other members of them. See `KVMergerCache`."""

    threshold: float = setting(0.75, read_number, "[-1, 1]")
    heavy_ratio: float = setting(0.25, read_number, "[0, 1)")
    recent_ratio: float = setting(0.25, read_number, "[0, 1)")

    window_size = None
    state_class = SetState

    def observe(self, prompt: PromptView) -> None:
        # Steps of fixed shapes take no other tensors than they began with.
        if prompt.remembered("pivots") is None:
            prompt.remember("pivots", torch.full_like(prompt.positions, NO_PIVOT).expand(prompt.key.shape[:3]).clone())

    def score(self, view: ScoringView) -> torch.Tensor:
        attention = view.attention.masked_fill(~view.is_token, 0)
        num_recent, num_heavy = ((view.num_kept * ratio).int() for ratio in (self.recent_ratio, self.heavy_ratio))
        is_recent = view.is_recent(num_recent.clamp(min=1)) & view.is_token
        ranks = attention.masked_fill(is_recent, -1).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        is_single = is_recent | (ranks < num_heavy)
        if view.state.protected is not None:
            is_single = is_single | is_protected(view.positions, view.state.protected)
        order = view.positions.expand_as(attention).argsort(dim=-1, stable=True)
        key = functional.normalize(view.key.float(), dim=-1)
        key = key.gather(2, order[..., None].expand_as(key))
        cosines = functional.pad((key[:, :, 1:] * key[:, :, :-1]).sum(dim=-1), (1, 0), value=-1.0)
        may_join = ~is_single.gather(-1, order) & view.is_token.expand_as(attention).gather(-1, order)
        follows = may_join & functional.pad(may_join[..., :-1], (1, 0), value=False) & (cosines >= self.threshold)
        sets = (~follows).cumsum(dim=-1) - 1  # in order of position
        ordered = attention.gather(-1, order)
        totals = torch.zeros_like(ordered).scatter_add_(-1, sets, ordered)
        highest = torch.zeros_like(ordered).scatter_reduce_(-1, sets, ordered, "amax")
        # Of members with equal attention the latest is the pivot.
        places = torch.arange(sets.shape[-1], device=sets.device).expand_as(sets)
        candidates = places.masked_fill(ordered < highest.gather(-1, sets), -1)
        pivots = torch.full_like(places, -1).scatter_reduce(-1, sets, candidates, "amax").gather(-1, sets)
        positions = view.positions.expand_as(attention).gather(-1, order)
        view.remember("pivots", torch.empty_like(positions).scatter_(-1, order, positions.gather(-1, pivots)))
        # A set counts as much as its members together. Those that are no pivot come behind all that are.
        scores = torch.where(pivots == places, totals.gather(-1, sets), ordered - ordered.amax(-1, keepdim=True) - 1)
        return torch.empty_like(scores).scatter_(-1, order, scores).masked_fill(is_recent, float("inf"))


class GaussianMerging(Compactor):
    """Members of a set join its pivot, if that stays."""

    def compact(self, view: LayerView, is_kept: torch.Tensor, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
        pivots = view.remembered("pivots")
        positions = view.positions.expand_as(pivots)
        order = positions.argsort(dim=-1)
        places = torch.searchsorted(positions.gather(-1, order), pivots.contiguous()).clamp(max=order.shape[-1] - 1)
        target = order.gather(-1, places)
        own = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        joins = ~is_kept & (positions >= 0) & is_kept.expand_as(pivots).gather(-1, target)
        target = torch.where(joins, target, own)
        index = target[..., None].expand_as(view.key)
        key = view.key.detach().float()
        squares = (key - key.gather(2, index)).square().sum(dim=-1)
        masses = torch.ones_like(squares) if bias is None else bias.exp()
        masses = masses.masked_fill(~(joins | is_kept), 0)
        counts = torch.zeros_like(squares).scatter_add_(-1, target, (joins | is_kept).float())
        widths = torch.zeros_like(squares).scatter_add_(-1, target, squares * joins) / counts.clamp(min=1)
        tiny = torch.finfo(squares.dtype).tiny
        weights = masses * torch.exp(-squares / (2 * widths.gather(-1, target)).clamp(min=tiny))
        return joined(view, target, masses, weights)


class KVMergerCache(PolicyCache):
    """
    Lets neighbours with similar keys share a slot (KVMerger, https://arxiv.org/abs/2407.08454).

    A layer holds `budget` slots and up to `eviction_interval` more: `batch * kv_heads * (budget + eviction_interval) *
    (2 * head_dim * itemsize + 16)` bytes. See `PolicyCache` for the other arguments and the errors.

    Args:
        threshold (`float`, defaults to 0.75): Tokens that follow each other with this cosine of their keys, or a
            larger one, form a set. Larger values merge fewer tokens, which are then evicted.
        heavy_ratio (`float`, defaults to 0.25): The share of the budget for tokens with the most attention, which are
            not merged.
        recent_ratio (`float`, defaults to 0.25): The share of the budget for the latest tokens, which are not merged.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import KVMergerCache
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> cache = KVMergerCache(model.config, budget=16)
    >>> tokens = model.generate(torch.arange(40)[None], past_key_values=cache, max_new_tokens=8, eos_token_id=None)
    >>> cache.get_seq_length(), cache.num_kept_tokens()
    (47, [23, 23])

    ```
    """

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        budget: float | int | str = 0.5,
        *,
        threshold: float = 0.75,
        heavy_ratio: float = 0.25,
        recent_ratio: float = 0.25,
        **options: Unpack[EvictionOptions],
    ) -> None:
        policy = KVMergerPolicy(threshold, heavy_ratio, recent_ratio)
        super().__init__(config, budget, policy, compactor=GaussianMerging, **options)
