"""Tiny seeded models that read images and text, and left-padded prompts with images for them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as remember
from typing import Any

import torch
from models import COMMON, Trace, left_pad, random_tokens
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForImageTextToText, Cache, PreTrainedConfig, PreTrainedModel


IMAGE, VIDEO, VISION_START, VISION_END = 101, 102, 103, 104
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
QWEN_IDS = {**IDS, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
TEXT = {**COMMON, "vocab_size": 105}
# Sixteen tokens for an image of 16 by 16 pixels.
CLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CLIP |= {"image_size": 16, "patch_size": 4}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
QWEN_TEXT = {**TEXT, **MROPE, "hidden_size": 64}
QWEN_VISION = {"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
GEMMA_TEXT = {**TEXT, "sliding_window": 8, "query_pre_attn_scalar": 16}
GEMMA_TEXT |= {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}

# What configs are given, by model type.
VISION_FAMILIES: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **CLIP, "projection_dim": 32},
        "image_token_id": IMAGE,
        "vision_feature_layer": -1,
    },
    "smolvlm": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": CLIP,
        "image_token_id": IMAGE,
        "scale_factor": 1,
    },
    "qwen2_vl": {
        "text_config": QWEN_TEXT,
        "vision_config": {**QWEN_VISION, "embed_dim": 32, "hidden_size": 64},
        **QWEN_IDS,
    },
    "qwen2_5_vl": {
        "text_config": QWEN_TEXT,
        "vision_config": {
            **{**QWEN_VISION, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48},
            **{"window_size": 16, "fullatt_block_indexes": [1]},
        },
        **QWEN_IDS,
    },
    "gemma3": {
        "text_config": GEMMA_TEXT,
        "vision_config": CLIP,
        "mm_tokens_per_image": 16,
        "image_token_index": IMAGE,
    },
}


def vision_config(name: str, **overrides: Any) -> PreTrainedConfig:
    """The config of a model that reads images."""
    return AutoConfig.for_model(name, **VISION_FAMILIES[name] | overrides)


def build_vision_model(name: str, attention: str = "sdpa", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A new tiny model, always the same for the same arguments."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(
            vision_config(name, **overrides), dtype=torch.float32, attn_implementation=attention
        )
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
            if parameter_name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.data *= 1.6
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


@dataclass(frozen=True)
class VisionRow:
    """
    A prompt of text and images, the same in every batch: `texts` are the numbers of text tokens before, between and
    behind the images.
    """

    texts: tuple[int, ...]
    seed: int = 0

    @property
    def num_images(self) -> int:
        return len(self.texts) - 1


# What one row of a batch was given so far.
History = list[VisionRow]


def grids_of(row: VisionRow) -> list[list[int]]:
    """For Qwen, whose images have different sizes: frames, and patches up and across."""
    return [[1, 4, 4 + 4 * ((index + row.seed) % 2)] for index in range(row.num_images)]


def ids_of(name: str, row: VisionRow) -> torch.Tensor:
    """The token ids of a row `(length,)`."""
    parts, grids = [], grids_of(row)
    for index, length in enumerate(row.texts):
        parts.append(random_tokens(length, seed=10 * row.seed + index))
        if index < row.num_images and name.startswith("qwen"):
            num_tokens = grids[index][1] * grids[index][2] // 4
            parts.append(torch.tensor([VISION_START, *[IMAGE] * num_tokens, VISION_END]))
        elif index < row.num_images:
            parts.append(torch.full((16,), IMAGE))
    return torch.cat(parts)


def images_of(name: str, row: VisionRow) -> torch.Tensor:
    """The pixels of a row's images: `(patches, pixels)` for Qwen, else `(images, 3, 16, 16)`."""
    shape = (row.num_images, 3, 16, 16)
    if name.startswith("qwen"):
        shape = (sum(height * width for _, height, width in grids_of(row)), 96)
    return torch.randn(shape, generator=torch.Generator().manual_seed(row.seed))


def vision_inputs(name: str, rows: list[History]) -> dict[str, torch.Tensor]:
    """What a model's processor makes of a batch, left-padded, but for the pixels."""
    ids = [torch.cat([ids_of(name, part) for part in row]) for row in rows]
    input_ids, attention_mask = left_pad(ids)
    inputs, types = {"input_ids": input_ids, "attention_mask": attention_mask}, (input_ids == IMAGE).long()
    if name == "gemma3":
        inputs["token_type_ids"] = types
    if name.startswith("qwen"):
        inputs["mm_token_type_ids"] = types
        if grids := [grid for row in rows for part in row for grid in grids_of(part)]:
            inputs["image_grid_thw"] = torch.tensor(grids)
    return inputs


def pixel_values(name: str, rows: list[VisionRow]) -> dict[str, torch.Tensor]:
    """The pixels of a batch, as an argument of the model; none if it has no image."""
    if not any(row.num_images for row in rows):
        return {}
    images = [images_of(name, row) for row in rows]
    if name == "smolvlm":  # images by row, those that are missing are zeros
        return {"pixel_values": pad_sequence(images, batch_first=True)}
    return {"pixel_values": torch.cat(images)}


def prompt_of(name: str, rows: list[VisionRow]) -> dict[str, torch.Tensor]:
    """What `generate` is given for a batch of prompts."""
    return vision_inputs(name, [[row] for row in rows]) | pixel_values(name, rows)


def position_ids(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    Those of all tokens: `(batch, tokens)`, and for Qwen `(4, batch, tokens)`, of which three say where patches of an
    image are.
    """
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    if "mm_token_type_ids" not in inputs:
        return positions
    if "image_grid_thw" not in inputs:
        return positions.expand(4, -1, -1)
    return torch.cat([positions[None], model.model.get_rope_index(**inputs)[0]])


@torch.no_grad()
def drive_vision(
    name: str,
    model: PreTrainedModel,
    cache: Cache,
    prompts: list[VisionRow],
    turns: list[list[VisionRow]],
    after_step: Callable[[int], None] | None = None,
) -> Trace:
    """
    Feed left-padded prompts to an empty cache, then turns, in each of which all rows have the same length. See
    `models.drive`; `tokens` of the trace are those of the turns.
    """
    histories: list[History] = [[] for _ in prompts]
    logits, positions, seen = [], [], 0
    for step, rows in enumerate([prompts, *turns]):
        histories = [[*history, row] for history, row in zip(histories, rows, strict=True)]
        inputs = vision_inputs(name, histories)
        given = pixel_values(name, rows)
        if given and "image_grid_thw" in inputs:
            given["image_grid_thw"] = vision_inputs(name, [[row] for row in rows])["image_grid_thw"]
        if "token_type_ids" in inputs:
            given["token_type_ids"] = inputs["token_type_ids"]
        output = model(
            input_ids=inputs["input_ids"][:, seen:],
            attention_mask=inputs["attention_mask"],
            position_ids=position_ids(model, inputs)[..., seen:],
            past_key_values=cache,
            use_cache=True,
            **given,
        )
        seen = inputs["input_ids"].shape[1]
        logits.append(output.logits[:, -1])
        positions.append([layer.held_positions().clone() for layer in cache.compressed_layers])
        if after_step is not None:
            after_step(step)
    lengths = [len(ids_of(name, row)) for row in prompts]
    pieces = [len(ids_of(name, rows[0])) for rows in turns]
    return Trace(torch.stack(logits, dim=1), positions, inputs["input_ids"][:, max(lengths) :], lengths, pieces)


def whole_row(name: str, model: PreTrainedModel, history: History) -> dict[str, torch.Tensor]:
    """The arguments of an uncached forward pass over all that a row was given."""
    inputs = vision_inputs(name, [history])
    inputs["position_ids"] = position_ids(model, inputs)
    if images := [images_of(name, part) for part in history if part.num_images]:
        inputs["pixel_values"] = torch.cat(images)[None] if name == "smolvlm" else torch.cat(images)
    return inputs


@remember
def vision_model(name: str) -> PreTrainedModel:
    """The shared model of a family; tests must leave it as they found it."""
    return build_vision_model(name)
