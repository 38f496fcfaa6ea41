"""A model with its tokenizer, ready for greedy decoding: what commands run."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pyramid_cache.lab import terminal
from pyramid_cache.lab.weights import MODEL_NAME, fetch_default_model


MODEL_HELP = f"folder or hub id of a causal language model (default: {MODEL_NAME})"


def where(model: PreTrainedModel) -> dict[str, str]:
    """What a record says of where a model runs, and in which type."""
    return {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model, ready for greedy decoding of a given number of tokens."""

    name: str  # what the user called it
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    end_token_ids: set[int]  # the tokens that end an answer

    def answer(self, token_ids: list[int]) -> str:
        """The text of generated tokens up to the first that ends the answer."""
        length = next((i for i, token_id in enumerate(token_ids) if token_id in self.end_token_ids), len(token_ids))
        return str(self.tokenizer.decode(token_ids[:length], skip_special_tokens=True)).strip()

    def require_positions(self, num_tokens: int, option: str) -> None:
        """Raises ValueError if the model was not made for sequences of that length: its answers would mean nothing."""
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit is not None and num_tokens > limit:
            raise ValueError(f"{num_tokens} tokens exceed the {limit} positions of {self.name}. Lower {option}.")


def load_chosen_model(options: argparse.Namespace, messages: "terminal.Console") -> LoadedModel:
    """Loads what `--model` and the options of `add_machine_options` choose, by default the default model."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    name = options.model or MODEL_NAME
    terminal.say(messages, f"Loading {name}")
    with terminal.ProgressBar(messages) as progress:
        folder = fetch_default_model(progress) if name == MODEL_NAME else name
    target = options.device or terminal.default_device()
    attention, num_ranks = getattr(options, "attn_implementation", None), getattr(options, "tensor_parallel", 1)
    return load_model(folder, name, target, options.dtype, attention, num_ranks)


def load_model(
    folder: str | Path,
    name: str,
    device: torch.device,
    dtype: str | None = None,
    attention: str | None = None,
    num_ranks: int = 1,
) -> LoadedModel:
    """
    Loads from a folder or the hub, by default in float32 on a CPU, else bfloat16; or an OSError or ValueError. Each
    `num_ranks` processes get a model together.
    """
    chosen: dict[str, Any] = {"dtype": getattr(torch, dtype or terminal.default_dtype(device))}
    chosen["attn_implementation"] = attention
    if num_ranks > 1:
        chosen["distributed_config"] = config_of_ranks(num_ranks)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, **chosen)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"The model {name} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    (model if num_ranks > 1 else model.to(device)).eval()
    configured = model.generation_config.eos_token_id
    end_token_ids = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
    # Without an end token every cache decodes as many tokens, whatever it answers; sampling settings go as well.
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=min(end_token_ids, default=0))
    return LoadedModel(name, model, tokenizer, end_token_ids)


def config_of_ranks(num_ranks: int) -> Any:
    """How transformers splits a model over `num_ranks` processes, and copies it to the others."""
    from transformers.distributed import DistributedConfig

    num_models = torch.distributed.get_world_size() // num_ranks
    copies: dict[str, Any] = {"dp_replicate_size": num_models} if num_models > 1 else {}
    try:
        return DistributedConfig(tp_plan="auto", tp_size=num_ranks, **copies)
    except TypeError as error:
        problem = f"This transformers cannot hold a model in {num_ranks} of {num_ranks * num_models} processes"
        raise ValueError(f"{problem}. Start {num_ranks} of them, or upgrade to 5.24 or later.") from error
