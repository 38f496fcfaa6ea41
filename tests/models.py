"""Tiny seeded models of every supported family, and what drives them with a cache.

The weights are drawn wide (`initializer_range` far above a trained model's), so that attention is far from uniform and
greedy tokens vary. Every model is float32, in eval mode, built from its config alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache as remember
from functools import partial
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PreTrainedConfig, PreTrainedModel


VOCAB_SIZE = 101

# What all families share: three layers, four query heads on two key heads of sixteen dimensions.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 8192,
    "initializer_range": 0.22,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}

HALF_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}

# name: (model type, what differs from those settings of COMMON that its config knows)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_multi_head": ("llama", {"num_key_value_heads": 4, "num_hidden_layers": 2}),
    "llama_multi_query": ("llama", {"num_key_value_heads": 1, "num_hidden_layers": 4}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"head_dim": 16}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "phi3": ("phi3", {"hidden_size": 64}),
    "glm4": ("glm4", HALF_ROTARY),
}

# What mixtures of experts need beside COMMON, by whatever names.
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
HYBRID = {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
# Attention over latent keys, in a mixture of experts.
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
LATENT |= {"head_dim": 8, "num_key_value_heads": 4, "first_k_dense_replace": 1}
LATENT |= {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
MAMBA = {"mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False}
MAMBA_2 = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 24, "mamba_n_groups": 1, "mamba_chunk_size": 16}
MAMBA_H1 = {**MAMBA_2, "mamba_d_ssm": 96}
ZAMBA = {"mamba_d_state": 8, "n_mamba_heads": 4, "num_key_value_heads": 4, "attention_head_dim": 24}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
STATES_FIRST = {"layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]}
STATES_FIRST |= {"num_hidden_layers": 4}
CONVOLUTIONS = {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4}
# The last two layers attend to the keys of the two before them.
SHARING = {"sliding_window": 8, "num_hidden_layers": 6, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}
SHARING |= {"vocab_size_per_layer_input": VOCAB_SIZE, "layer_types": ["full_attention", "sliding_attention"] * 3}
GEMMA_3N = {"laurel_rank": 8, "altup_num_inputs": 2, "intermediate_size": 64}
CHUNKED = {"attention_chunk_size": 8, "layer_types": ["full_attention", "chunked_attention", "full_attention"]}

# Further architectures.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_hybrid": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "gemma2": ("gemma2", {**HYBRID, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", {**HYBRID, "query_pre_attn_scalar": 16}),
    "olmo2": ("olmo2", {}),
    "gpt2": ("gpt2", {}),
    "gpt_oss": ("gpt_oss", {**EXPERTS, **HYBRID}),
    "mixtral": ("mixtral", {**EXPERTS, "sliding_window": None}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "gpt_neox": ("gpt_neox", HALF_ROTARY),
    "cohere": ("cohere", {}),
    "stablelm": ("stablelm", {**HALF_ROTARY, "hidden_size": 64}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 48}),
    "granite": ("granite", {"attention_multiplier": 0.25}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "jamba": ("jamba", {**EXPERTS, **MAMBA, "attn_layer_period": 2, "attn_layer_offset": 1}),
    "bamba": ("bamba", {**MAMBA_2, "attn_layer_indices": [1]}),
    "qwen3_next": ("qwen3_next", {**EXPERTS, **LINEAR, **STATES_FIRST, "shared_expert_intermediate_size": 32}),
    "qwen3_5": ("qwen3_5_text", {**LINEAR, **STATES_FIRST}),
    "qwen3_5_moe": ("qwen3_5_moe_text", {**EXPERTS, **LINEAR, **STATES_FIRST, "shared_expert_intermediate_size": 32}),
    "olmo_hybrid": ("olmo_hybrid", {**LINEAR, **STATES_FIRST}),
    "lfm2": ("lfm2", {**CONVOLUTIONS, "block_auto_adjust_ff_dim": False}),
    "lfm2_moe": ("lfm2_moe", {**EXPERTS, **CONVOLUTIONS}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {**EXPERTS, **MAMBA_2, "shared_intermediate_size": 64, "head_dim": 12}
        | {"layer_types": ["mamba", "attention", "attention"], "attention_multiplier": 0.25},
    ),
    "nemotron_h": (
        "nemotron_h",
        {"layers_block_type": ["linear_attention", "full_attention", "mlp", "full_attention"], "n_groups": 1}
        | {"mamba_num_heads": 4, "mamba_head_dim": 24, "ssm_state_size": 8, "chunk_size": 16}
        | {"initializer_range": 0.1},  # drawn wider, it is not close to itself without a cache
    ),
    "falcon_h1": ("falcon_h1", MAMBA_H1),
    "zamba": ("zamba", {**ZAMBA, "attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4}),
    "zamba2": (
        "zamba2",
        {**ZAMBA, "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4}
        | {"mamba_ngroups": 1, "chunk_size": 16, "num_mem_blocks": 1, "use_mem_rope": True, "initializer_range": 0.1},
    ),
    "gemma3n": ("gemma3n_text", {**SHARING, **GEMMA_3N, "activation_sparsity_pattern": [0.0] * 6}),
    "gemma4": ("gemma4_text", {**SHARING, "global_head_dim": 16}),
    "cohere2": ("cohere2", HYBRID),
    "olmo3": ("olmo3", HYBRID),
    "exaone4": ("exaone4", HYBRID),
    "afmoe": ("afmoe", {**EXPERTS, **HYBRID}),
    "llama4": ("llama4_text", {**EXPERTS, **CHUNKED, "intermediate_size_mlp": 64}),
}
# Those that no cache of ours can serve.
REFUSED_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": ("deepseek_v2", LATENT),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "falcon": ("falcon", {"new_decoder_architecture": True}),
    "falcon_alibi": ("falcon", {"alibi": True}),
    "minimax": ("minimax", {**EXPERTS, "layer_types": ["linear_attention", "full_attention", "full_attention"]}),
    "kimi_linear": ("kimi_linear", LATENT),
    "jetmoe": ("jetmoe", {**EXPERTS, "kv_channels": 16}),
    **{name: (name, {}) for name in ("bloom", "mpt", "diffllama", "doge", "rwkv")},
    "mistral_sliding": ("mistral", {"sliding_window": 8}),
}

# Those whose attention goes through transformers' interface from 5.24 on: refused before.
LATER_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {"gptj": ("gptj", {"rotary_dim": 8})}
ALL_ARCHITECTURES = FAMILIES | ARCHITECTURES | REFUSED_ARCHITECTURES | LATER_ARCHITECTURES

# Llama with every kind of rotary embedding that stretches positions and can be un-rotated.
ROPE_VARIANTS: dict[str, dict[str, float]] = {
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
}


def build_config(name: str, **overrides: Any) -> PreTrainedConfig:
    """The config of a family, an architecture, `llama_<variant>` of `ROPE_VARIANTS`, or any model type."""
    variant = name.removeprefix("llama_")
    if variant in ROPE_VARIANTS:
        rope = {"rope_type": variant, "rope_theta": 1e4, **ROPE_VARIANTS[variant]}
        length = int(rope.get("original_max_position_embeddings", 2048) * rope["factor"])
        name, overrides = "llama", {"rope_parameters": rope, "max_position_embeddings": length, **overrides}
    model_type, differences = ALL_ARCHITECTURES.get(name, (name, {}))
    plain = AutoConfig.for_model(model_type)
    known = {*vars(plain), *type(plain).attribute_map, "num_key_value_heads", "initializer_range"}
    settings = {key: value for key, value in COMMON.items() if key in known}
    return AutoConfig.for_model(model_type, **settings | differences | overrides)


def build_model(name: str, seed: int = 0, attention: str = "sdpa", **overrides: Any) -> PreTrainedModel:
    """A new tiny model of a family, always the same for the same arguments."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            build_config(name, **overrides), dtype=torch.float32, attn_implementation=attention
        )
        # Biases and norms are born as zeros and ones, which would hide a bias or a norm that is left out.
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
            if parameter_name.endswith(("q_norm.weight", "k_norm.weight")):
                # Normed queries and keys attend almost evenly otherwise.
                parameter.data *= 1.6
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


@remember
def tiny_model(name: str) -> PreTrainedModel:
    """The shared model of a family; tests must leave it as they found it."""
    return build_model(name, seed=sum(name.encode()))


def uniform_attention_model(**overrides: Any) -> PreTrainedModel:
    """A Llama whose queries are all zero: every query spreads its attention evenly over what it sees."""
    model = build_model("llama", **overrides)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    return model


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids without the padding and the special ones, of the given shape."""
    return torch.randint(3, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def random_rows(lengths: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    """One random prompt `(length,)` for each length."""
    return [random_tokens(length, seed=1000 * seed + index) for index, length in enumerate(lengths)]


def left_pad(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-pad prompts to the longest: token ids and attention mask, each `(batch, longest)`."""
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    return pad(rows), pad([torch.ones_like(row) for row in rows])


def generate(
    model: PreTrainedModel, cache: Cache | None, rows: list[torch.Tensor], new_tokens: int, **settings: Any
) -> Any:
    """Greedy `generate` on left-padded prompts; returns its dictionary with `sequences` and `logits`."""
    input_ids, attention_mask = left_pad(rows)
    return model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        past_key_values=cache,
        max_new_tokens=new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )


@dataclass
class Trace:
    """What a model with a cache gave at each step; step 0 is the prompt, step i the i-th token after it."""

    logits: torch.Tensor  # of the last token of each step, (batch, steps, vocabulary)
    positions: list[list[torch.Tensor]]  # by step and evicting layer: (batch, kv_heads, slots), -1 for empty
    tokens: torch.Tensor  # fed after the prompt, (batch, later)
    lengths: list[int] = field(default_factory=list)  # real tokens of each row's prompt
    pieces: list[int] = field(default_factory=list)  # how many tokens each step after the prompt fed

    def held(self, step: int, layer: int, row: int, head: int) -> list[int]:
        """The positions a head of a row held after a step, in rising order."""
        return sorted(position for position in self.positions[step][layer][row, head].tolist() if position >= 0)


@torch.no_grad()
def drive(
    model: PreTrainedModel,
    cache: Cache,
    rows: list[torch.Tensor],
    continuation: torch.Tensor | int,
    after_step: Callable[[int], None] | None = None,
    with_mask: bool = True,
    pieces: list[int] | None = None,
) -> Trace:
    """
    Feed left-padded prompts `rows` to an empty cache, then the tokens of `continuation` `(batch, later)`, or so many
    greedily: one at a time, or as many as `pieces` says. `after_step` is called with the number of each step. Without
    a mask no row may be padded.
    """
    input_ids, attention_mask = left_pad(rows)
    if pieces is None:
        pieces = [1] * (continuation if isinstance(continuation, int) else continuation.shape[1])
    logits, positions, tokens = [], [], []
    for step, piece in enumerate([0, *pieces]):
        if step:
            start = sum(pieces[: step - 1])
            is_greedy = isinstance(continuation, int)
            input_ids = logits[-1].argmax(-1, keepdim=True) if is_greedy else continuation[:, start : start + piece]
            tokens.append(input_ids)
            attention_mask = torch.cat([attention_mask, torch.ones_like(input_ids)], dim=-1)
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask if with_mask else None,
            position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(output.logits[:, -1])
        positions.append([layer.held_positions().clone() for layer in cache.compressed_layers])
        if after_step is not None:
            after_step(step)
    fed = torch.cat(tokens, dim=-1) if tokens else torch.zeros(len(rows), 0, dtype=torch.long)
    return Trace(torch.stack(logits, dim=1), positions, fed, [len(row) for row in rows], pieces)
