"""The cache that keeps what a `Policy` scores highest."""

import dataclasses
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from pyramid_cache.engine.architectures import refuse_unsupported_rope
from pyramid_cache.engine.arguments import check_decoder_config
from pyramid_cache.engine.budget import parse_budget, read_count
from pyramid_cache.engine.cache import CompressedCache, config_and_model
from pyramid_cache.engine.evicting import EvictingLayer
from pyramid_cache.engine.held import LayerPlace
from pyramid_cache.engine.policy import Policy
from pyramid_cache.engine.sharing import SharedBudget
from pyramid_cache.engine.tokens import MaskReader


DEFAULT_EVICTION_INTERVAL = 32


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
        masks (`MaskReader`, *optional*): Tells tokens from padding, for a method that has a reader of its own.

    Raises:
        ValueError: For an argument outside its range, or a model that cannot be compressed.
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

    def __init__(
        self,
        config: PreTrainedConfig | PreTrainedModel,
        budget: float | int | str,
        policy: Policy,
        *,
        eviction_interval: int = DEFAULT_EVICTION_INTERVAL,
        masks: MaskReader | None = None,
    ) -> None:
        config, _ = config_and_model(config)
        check_decoder_config(config)
        parsed_budget = parse_budget(budget)
        if not isinstance(policy, Policy):
            raise ValueError(f"`policy={policy!r}` must be an instance of a class that derives from Policy.")
        eviction_interval = read_count("eviction_interval", eviction_interval, least=1)
        self.policy = policy
        self.shared: SharedBudget | None = None

        def build_layer(place: LayerPlace, masks: MaskReader) -> EvictingLayer:
            if policy.layers_share_budget and self.shared is None:
                self.shared = SharedBudget(place.num_layers)
            return EvictingLayer(place, masks, parsed_budget, policy, eviction_interval, self.shared)

        settings: dict[str, Any] | None = None
        if type(self).__init__ is not PolicyCache.__init__:
            # A cache with a constructor of its own takes the fields of its policy as arguments.
            own: dict[str, Any] = dataclasses.asdict(policy) if dataclasses.is_dataclass(policy) else {}
            settings = {"budget": budget, **own, "eviction_interval": eviction_interval}
        super().__init__(config, build_layer, settings, masks)
        if policy.needs_rotary:
            refuse_unsupported_rope(config)

    def activate_past_recording(self) -> None:
        if self.shared is not None:
            raise NotImplementedError(
                "Assisted generation and prompt lookup take tokens back in one layer after the other, which layers "
                "that share a budget cannot follow. Use a policy without `layers_share_budget` with them."
            )
        super().activate_past_recording()

    def reset(self) -> None:
        if self.shared is not None:
            self.shared.waiting.clear()
        super().reset()
