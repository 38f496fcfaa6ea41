"""The cache that keeps what a `Policy` scores highest."""

import inspect
from collections.abc import Callable
from typing import Any, TypedDict

from transformers import PreTrainedConfig, PreTrainedModel

from pyramid_cache.engine.architectures import refuse_unsupported_rope
from pyramid_cache.engine.arguments import check_decoder_config
from pyramid_cache.engine.budget import parse_budget, read_count
from pyramid_cache.engine.cache import CompressedCache, config_and_model
from pyramid_cache.engine.compaction import Compactor, Merging
from pyramid_cache.engine.evicting import EvictingLayer
from pyramid_cache.engine.held import LayerPlace
from pyramid_cache.engine.policy import Policy
from pyramid_cache.engine.protection import Protect, plain_setting, read_protect
from pyramid_cache.engine.quantization import Quantizer, read_quantizer
from pyramid_cache.engine.sharing import DividedBudget, OnlineBudget, SharedBudget
from pyramid_cache.engine.tokens import MaskReader


DEFAULT_EVICTION_INTERVAL = 32
RANKINGS = ("head", "layer", "model", "model-online")


class CommonOptions(TypedDict, total=False):
    """Arguments that all caches pass on to `PolicyCache`, which explains them."""

    ranking: str | None
    protect: Protect
    merge: bool
    quantize: str | None
    thin_keys: float | None
    residual_length: int | None


class EvictionOptions(CommonOptions, total=False):
    """These, of caches with the default interval."""

    eviction_interval: int


class PolicyCache(CompressedCache):
    """
    Keeps the tokens with the highest scores of a policy. Use it for a `Policy` of your own; the caches whose method is
    a score derive from it.

    A layer holds `budget` tokens and up to `eviction_interval` more, however much is generated. The prompt is read
    with full attention, so the first new token is exact.

    Args:
        config (`PreTrainedConfig` or `PreTrainedModel`): The config of the model, or the model itself.
        budget (`float`, `int` or `str`): What each layer keeps: a fraction of the prompt, a number of tokens, or bytes
            for all layers that evict ("256MiB"). In later turns, a fraction is of all tokens seen. 1.0 never evicts.
        policy (`Policy`): Scores the tokens.
        eviction_interval (`int`, defaults to 32): How many generated tokens wait for an eviction. Larger values take
            more memory and less time.
        ranking (`str`, *optional*): Which tokens compete for the budget: those of each "head", of all heads of a
            "layer", or of all heads of all layers of the "model". By default what the policy says. Where heads
            compete, a layer holds as many tokens in all, and each head those of its own that are among the best. With
            "model", a prompt stays whole until the last layer has read it. With "model-online", each layer evicts as
            soon as it has read it, by a threshold from the layers below. The prompt is then never whole in all layers.
            With these two, each layer keeps its share while an answer grows. `compress` then takes a fraction of the
            tokens of the last prompt or turn, and with the other two one of all tokens seen.
        protect (`int`, `Sequence` or `torch.Tensor`, *optional*): Tokens that are never evicted, as a part of the
            budget: how many at the start of each row, a list of positions (padding not counted), or a list of such
            lists, one for each row of the batch. More of them leave less room for the others.
        merge (`bool`, defaults to `False`): Whether a token that goes joins the token of its head that stays and has
            the most similar key, by cosine. That slot then holds means of keys and values, and counts in attention as
            often as it has tokens. Protected tokens take none; where a head keeps no other, tokens are evicted. It
            takes 4 bytes more per slot and head.
        quantize (`str`, *optional*): How all but the latest tokens are stored: in 4 or 2 bits ("kivi4", "kivi2"), in
            which 32 neighbouring channels share a scale, or in a byte ("int8", "fp8"). See docs/quantized.md.
        thin_keys (`float`, *optional*): The share of their channels that older keys lose, 0.4 in the paper of ThinK.
            Larger values take less memory, and change attention more. See docs/thin-keys.md.
        residual_length (`int`, *optional*): With `quantize` or `thin_keys`, how many of the latest tokens of each row
            stay as they are, as far as the method keeps them, and up to 31 more: by default 128, and 32 with
            `thin_keys` alone. Larger values take more memory.
        masks (`MaskReader`, *optional*): Tells tokens from padding, for a method that has a reader of its own.
        compactor (`type`, *optional*): What becomes of tokens that go, for a method that has a `Compactor` of its own.

    Raises:
        ValueError: For an argument outside its range, or a model that cannot be compressed. At a forward pass and at
            `compress`, if a layer would keep fewer tokens than are protected.
        NotImplementedError: For a policy that needs to know how keys are rotated, and a model whose RoPE depends on
            the length (dynamic NTK) or has several axes; at the first forward pass where the config does not tell.

    Example:

    ```python
    >>> from dataclasses import dataclass
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import Policy, PolicyCache
    >>> import torch

    >>> @dataclass(frozen=True)
    ... class LargestValues(Policy):
    ...     def score(self, view):
    ...         return view.value.norm(dim=-1)

    >>> config = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
    >>> model = LlamaForCausalLM(config)
    >>> cache = PolicyCache(model.config, budget=16, policy=LargestValues())
    >>> tokens = model.generate(torch.arange(40)[None], past_key_values=cache, max_new_tokens=8, eos_token_id=None)
    >>> cache.compress()
    >>> cache.num_kept_tokens()
    [16, 16]

    ```
    """

    # Whether tokens stay until `settle` of `shared`, which is then called after each prompt.
    waits = False

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        budget: float | int | str,
        policy: Policy,
        *,
        eviction_interval: int = DEFAULT_EVICTION_INTERVAL,
        ranking: str | None = None,
        protect: Protect = None,
        merge: bool = False,
        masks: MaskReader | None = None,
        compactor: Callable[[], Compactor] | None = None,
        quantize: str | Quantizer | None = None,
        thin_keys: float | None = None,
        residual_length: int | None = None,
    ) -> None:
        config, _ = config_and_model(config)
        check_decoder_config(config)
        parsed_budget = parse_budget(budget)
        if not isinstance(policy, Policy):
            raise ValueError(f"`policy={policy!r}` must be an instance of a class that derives from Policy.")
        if policy.needs_replay and not self.waits:
            raise ValueError(
                f"{type(policy).__name__} scores tokens by a second reading of the prompt, which "
                f"{type(self).__name__} does not do. Use KVzipCache, KVzipPlusCache or AttentionMatchingCache."
            )
        eviction_interval = read_count("eviction_interval", eviction_interval, least=1)
        ranking = read_ranking(ranking, policy, self.waits)
        if not isinstance(merge, bool):
            raise ValueError(f"`merge={merge!r}` must be True or False.")
        if merge and compactor is not None:
            raise ValueError(
                f"`merge=True`: {type(self).__name__} has a way of its own with the tokens that go. Leave `merge` out."
            )
        compactor = Merging if merge else compactor
        if compactor is not None and compactor().merges_generated:
            refuse_merging(policy, eviction_interval)
        quantizer = read_quantizer(quantize, thin_keys, residual_length)
        if quantizer is not None and quantizer.thin_keys and policy.repositions:
            raise NotImplementedError(
                f"`thin_keys={thin_keys}`: {type(policy).__name__} rotates keys that it holds, which takes the "
                "channels that thin keys lack. Leave `thin_keys` out."
            )
        spans = read_protect(protect)
        num_protected = max(map(len, spans), default=0)
        if parsed_budget.kind == "tokens" and num_protected > parsed_budget.amount:
            raise ValueError(
                f"`budget={budget}` has no room for the {num_protected} tokens of `protect`, which count in it. Raise "
                "`budget`, or protect fewer tokens."
            )
        self.policy = policy
        self.shared: SharedBudget | OnlineBudget | None = None

        def build_layer(place: LayerPlace, masks: MaskReader) -> EvictingLayer:
            if self.shared is None:
                self.shared = shared_budget(ranking, self.waits, place.num_layers, policy)
            own = compactor() if compactor is not None and not parsed_budget.is_unlimited else None
            return EvictingLayer(
                place, masks, parsed_budget, policy, eviction_interval, ranking, self.shared, spans, own, quantizer
            )

        settings: dict[str, Any] | None = None
        if type(self).__init__ is not PolicyCache.__init__:
            # A cache with a constructor of its own takes the fields of its policy as arguments.
            settings = {"budget": budget, **policy.settings, "eviction_interval": eviction_interval}
            given: dict[str, Any] = {"ranking": ranking}
            given |= {"protect": plain_setting(spans)} if spans else {}
            given |= {"merge": True} if merge else {}
            if quantizer is not None:
                options = {"quantize": quantize, "thin_keys": thin_keys, "residual_length": quantizer.residual_length}
                given |= {name: value for name, value in options.items() if value is not None}
            # What a constructor does not take, it has chosen itself.
            taken = inspect.signature(type(self).__init__).parameters.values()
            names = [each.name for each in taken if each.kind is not each.VAR_KEYWORD]
            settings |= given if len(names) < len(taken) else {name: given[name] for name in names if name in given}
        super().__init__(config, build_layer, settings, masks)
        if policy.needs_rotary:
            refuse_unsupported_rope(config)

    def activate_past_recording(self) -> None:
        if self.shared is not None:
            has_choice = not self.waits and not self.policy.divides_budget
            way_out = '`ranking="layer"` or `ranking="head"`' if has_choice else "another cache"
            raise NotImplementedError(
                "Assisted generation and prompt lookup take tokens back in one layer after the other, which layers "
                f"that evict together cannot follow. Use {way_out} with them."
            )
        super().activate_past_recording()

    def reset(self) -> None:
        if self.shared is not None:
            self.shared.forget()
        super().reset()


def refuse_merging(policy: Policy, eviction_interval: int) -> None:
    """Raises ValueError unless a policy's tokens can be merged."""
    if policy.repositions:
        raise ValueError(
            f"`merge=True` gives a slot the mean of several keys, which {type(policy).__name__} cannot move. Leave "
            "`merge` out."
        )
    if eviction_interval == 1:
        raise ValueError(
            "`eviction_interval=1`: tokens are merged when a layer evicts several of them, but these go one by one. "
            "Give 2 or more."
        )


def read_ranking(ranking: str | None, policy: Policy, waits: bool) -> str:
    """Which tokens compete. Raises ValueError unless it is one of `RANKINGS`, and possible for the policy."""
    ranking = policy.ranking if ranking is None else ranking
    if ranking not in RANKINGS:
        raise ValueError(f"`ranking={ranking!r}` is unknown: choose one of {RANKINGS}.")
    if policy.divides_budget and ranking.startswith("model"):
        raise ValueError(
            f"`ranking={ranking!r}` lets the tokens of all layers compete, but {type(policy).__name__} gives each "
            'layer a budget of its own. Give `ranking="layer"`, or leave it out.'
        )
    if ranking == "model-online" and waits:
        raise ValueError(
            f"`ranking={ranking!r}` evicts from each layer in turn, but all layers are scored after the prompt, which "
            'is read a second time. Give `ranking="model"`.'
        )
    if ranking != "head" and (policy.heads_share_tokens or policy.repositions):
        reason = "all heads keep the same tokens" if policy.heads_share_tokens else "keys move within their slots"
        raise ValueError(
            f"`ranking={ranking!r}` lets heads keep different numbers of tokens, but with {type(policy).__name__} "
            f'{reason}. Leave `ranking="head"`.'
        )
    return ranking


def shared_budget(ranking: str, waits: bool, num_layers: int, policy: Policy) -> SharedBudget | OnlineBudget | None:
    """What the layers of a cache have in common; None if each evicts on its own."""
    if policy.divides_budget:
        return DividedBudget(num_layers, policy.divide)
    if ranking == "model-online":
        return OnlineBudget(num_layers)
    shares = ranking == "model"
    return SharedBudget(num_layers, shares, waits) if shares or waits else None
