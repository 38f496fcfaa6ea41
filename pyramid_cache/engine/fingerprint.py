"""
What tells models apart: the fields of their configs that decide keys and values, and samples of their weights.

A cache that was filled by one model is garbage to another, which no shape gives away if the two differ by training
alone.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pyramid_cache.engine.architectures import attribute_of


# What keys and values depend on beside the weights. Fields that a config does not have count as None. Those of
# training and generation, and the ids of special tokens, may differ.
ARCHITECTURE_FIELDS = """
    model_type num_hidden_layers layer_types hidden_size intermediate_size hidden_act hidden_activation vocab_size
    num_attention_heads num_key_value_heads num_global_key_value_heads head_dim global_head_dim attention_bias
    kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim
    sliding_window attention_chunk_size num_kv_shared_layers
    max_position_embeddings rope_parameters rope_theta partial_rotary_factor no_rope_layers position_embedding_type
    alibi rms_norm_eps layer_norm_eps layer_norm_epsilon query_pre_attn_scalar attn_logit_softcapping
    embedding_multiplier residual_multiplier attention_multiplier
    num_experts num_local_experts n_routed_experts num_experts_per_tok
""".split()
# Elements of each parameter that are looked at.
NUM_SAMPLES = 1024


def architecture_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of `ARCHITECTURE_FIELDS` of the text decoder, as JSON would give them back."""
    config = config.get_text_config(decoder=True)
    fields = {name: attribute_of(config, name) for name in ARCHITECTURE_FIELDS}
    if fields["rope_parameters"]:  # they have both numbers; some versions of transformers repeat them
        fields["rope_theta"] = fields["partial_rotary_factor"] = None
    return json.loads(json.dumps(fields, default=str))


@dataclass(frozen=True)
class WeightFingerprint:
    """Of one attention module."""

    module: str  # the name of its class
    dtype: str  # of its first parameter
    digest: str  # SHA-256 in hexadecimal of names, dtypes, shapes and samples of all parameters

    @staticmethod
    @torch.no_grad()
    def of(module: nn.Module) -> "WeightFingerprint | None":
        """None where the weights are not there to be looked at: on the meta device (offloaded), or packed tensors."""
        digest = hashlib.sha256()
        parameters = sorted(module.named_parameters())
        for name, parameter in parameters:
            weights = parameter.detach()
            if weights.is_meta or type(weights) is not torch.Tensor:
                return None
            digest.update(f"{name} {weights.dtype} {tuple(weights.shape)}\n".encode())
            # An odd stride does not stay in a few columns of a matrix.
            samples = weights.reshape(-1)[:: max(weights.numel() // NUM_SAMPLES, 1) | 1]
            digest.update(samples.contiguous().cpu().view(torch.uint8).numpy().data)
        if not parameters:
            return None
        return WeightFingerprint(type(module).__name__, str(parameters[0][1].dtype), digest.hexdigest())

    @torch.compiler.disable
    def require_same(self, module: nn.Module) -> None:
        """Raises ValueError if the weights of `module` are known to be others."""
        found = WeightFingerprint.of(module)
        if found is None or found.digest == self.digest:
            return
        difference = "with other weights (another checkpoint, or an adapter)"
        if (found.module, found.dtype) != (self.module, self.dtype):
            difference = f"with {self.module} in {self.dtype} instead of {found.module} in {found.dtype}"
        raise ValueError(
            f"The cache was loaded from a file that a model {difference} has filled. Use it with the model that made "
            "it, or make it again with this one."
        )


def device_of_layer(model: PreTrainedModel, layer_idx: int) -> torch.device:
    """Where a model that may be spread over several devices computes a layer."""
    for module in model.modules():
        if getattr(module, "layer_idx", None) == layer_idx:
            parameter = next(module.parameters(), None)
            if parameter is not None and not parameter.is_meta:
                return parameter.device
    return model.device
