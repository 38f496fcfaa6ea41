"""The options for a model and a cache that the scripts beside this file share, and how they end when something is wrong."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from caches_by_name import CACHE_NAMES, build_cache, read_number
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pyramid_cache.lab.terminal import device, positive_int
from pyramid_cache.lab.weights import MODEL_NAME, fetch_default_model


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `load_model` reads."""
    parser.add_argument("--model", help=f"folder or hub id of a causal language model (default: {MODEL_NAME})")
    parser.add_argument("--device", type=device, default="cpu", help="where to run (default: cpu)")
    parser.add_argument(
        "--threads", type=positive_int, metavar="N", help="threads of the CPU (default: torch's choice)"
    )


def load_model(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that the options name, ready for greedy decoding, and its tokenizer."""
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = options.model or fetch_default_model()
    dtype = torch.float32 if options.device.type == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(options.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    configured = model.generation_config.eos_token_id
    end_token_ids = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=sorted(end_token_ids) or None, pad_token_id=tokenizer.pad_token_id
    )
    return model, tokenizer


def setting(text: str) -> tuple[str, Any]:
    """Reads NAME=VALUE, where the value is a number, true, false, or text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, {"true": True, "false": False}.get(value.lower(), read_number(value))


def add_cache_options(parser: argparse.ArgumentParser, cache: str, budget: str) -> None:
    """Adds the options that `new_cache` reads; a script has a cache by default, and a budget for that cache."""
    parser.add_argument(
        "--cache",
        choices=CACHE_NAMES,
        default=cache,
        metavar="NAME",
        help=f"one of {', '.join(CACHE_NAMES)} (default: {cache})",
    )
    parser.add_argument(
        "--budget",
        type=read_number,
        help="tokens per layer (512), a fraction of the prompt (0.4) or bytes (256MiB); of StreamingLLMCache the length of "
        "its window, of ShadowKVCache how many tokens a step attends to "
        f"(default: {budget} for {cache}, for others what the class has as its default)",
    )
    parser.add_argument(
        "--setting",
        type=setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a further argument of the cache, such as eviction_interval=8; may be given again",
    )
    parser.set_defaults(default_budgets={cache: read_number(budget)})


def new_cache(options: argparse.Namespace, model: PreTrainedModel) -> Cache:
    """A new one of the caches that the options ask for."""
    budget = options.default_budgets.get(options.cache) if options.budget is None else options.budget
    return build_cache(options.cache, model, budget, **dict(options.setting))


def run(main: Callable[[], None]) -> None:
    """Runs a script. What it refuses becomes one line on stderr and the exit status 2."""
    try:
        main()
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
