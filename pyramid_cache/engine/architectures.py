"""
Which architectures cannot be served, and why. A cache for one of them is refused when it is built.

A cache layer meets its queries in the attention function, which must get the key tensor that `update` returned
(`attention.py`). The models below attend to other keys, or in other ways. A model that is not below is served. Its
first forward pass raises an error if its attention does not go through the interface.
"""

import inspect
from typing import Any

from transformers import GenerationMixin, PreTrainedConfig


# The name of the cache among the arguments of models and of `generate`: `cache` from transformers 5.24 on. It warns of
# the earlier name.
_ARGUMENTS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_ARGUMENT = "cache" if "cache" in _ARGUMENTS else "past_key_values"
# What stands against model types, those of text decoders.
REASONS = {
    "its attention does not go through the attention interface of transformers": """
        autoformer bark big_bird blip_text_model bloom clvp_decoder clvp_encoder cpmant falcon flaubert fsmt git
        gpt_neo gpt_neox_japanese imagegpt led megatron-bert mpt mvp prophetnet reformer rembert roformer speecht5
        tapas trocr xglm xlm""",
    "its attention adds a learned bias of positions to the logits": """
        inkling2_loop_text inkling2_text inkling_text longt5 mt5 pix2struct_text_model pop2piano switch_transformers t5
        udop umt5""",
    "it keeps no cache of keys and values": """
        falcon_mamba mamba mamba2 openai-gpt pi0 rwkv xlnet xlstm""",
    "it attends to other keys than those that it stores": "deepseek_v4 jetmoe",
    "its attention takes `block_indices`, which is not known": "minimax_m3_vl_text",
    "its attention hides keys by what their values are": "doge",
    "its attention mixes the keys of the encoder with those of the decoder": "t5gemma2_decoder",
    "its decoder's attention is not marked as causal": "bigbird_pegasus nllb-moe",
    "its layers attend more than once": "diffllama",
    "it takes no cache but one of its own": "minimax",
    "it repeats layers, for which it adds others to the cache or reads what the cache holds": "dory",
    "some of its layers keep an image in the place of the text": "mllama_text_model",
}
REASON_BY_TYPE = {model_type: reason for reason, names in REASONS.items() for model_type in names.split()}
if CACHE_ARGUMENT == "past_key_values":  # from 5.24 on they go through the interface
    REASON_BY_TYPE |= dict.fromkeys(("codegen", "gptj"), next(iter(REASONS)))


def reason_against(config: PreTrainedConfig) -> str | None:
    """Why the attention of a decoder with this config cannot be served: half of an error's sentence."""
    if config.model_type in REASON_BY_TYPE:
        return REASON_BY_TYPE[config.model_type]
    if attribute_of(config, "kv_lora_rank"):
        return "it stores latents in the place of the keys that it attends to (multi-head latent attention)"
    if attribute_of(config, "use_bidirectional_attention") in (True, "all"):
        return "it attends to its prompt in both directions"
    if attribute_of(config, "reorder_and_upcast_attn") and config._attn_implementation == "eager":
        return "eager attention with `reorder_and_upcast_attn` does not go through the attention interface"
    return None


def attribute_of(config: PreTrainedConfig, name: str) -> Any:
    """An attribute of a config, None if there is none; a list by layer where layers differ, as in Gemma 4."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers says that the attribute is ambiguous
        return [getattr(layer_config, name, None) for layer_config in config.per_layer_config]


def shared_layers(config: PreTrainedConfig) -> set[int]:
    """The layers of a text decoder to whose keys and values later layers attend, which have none of their own."""
    # Later layers attend to the last one of their kind.
    first_later = config.num_hidden_layers - (attribute_of(config, "num_kv_shared_layers") or 0)
    kinds = getattr(config, "layer_types", None) or []
    later = set(kinds[first_later:])
    return {first_later - 1 - kinds[:first_later][::-1].index(kind) for kind in later}


def refuse_unsupported_rope(config: PreTrainedConfig) -> None:
    """Raises NotImplementedError where the config tells of a rotation that keys cannot be moved by."""
    text_config = config.get_text_config(decoder=True)
    parameters = getattr(text_config, "rope_parameters", None) or {}
    for settings in (parameters, *(each for each in parameters.values() if isinstance(each, dict))):
        if "dynamic" in str(settings.get("rope_type", "")):
            remedy = "A rope_type like 'yarn' does not."
            raise rope_refusal(config, f"dynamic NTK scaling, which depends on the length. {remedy}")
        if text_config is not config and any("mrope" in key for key in settings):
            remedy = "For text alone, build the cache from `model.config.get_text_config()`."
            raise rope_refusal(config, f"positions with several axes (mrope) if it is given images. {remedy}")


def rope_refusal(owner: Any, reason: str) -> NotImplementedError:
    way_out = "Use a cache that leaves keys at the positions the model gave them, such as SnapKVCache."
    return NotImplementedError(f"{type(owner).__name__} rotates keys by {reason} {way_out}")
