"""What the scripts beside this file share: options for a model and a cache, and how a script ends when it fails."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.engine.replay import ReplayingCache
from pyramid_cache.lab import loaded_model
from pyramid_cache.lab.registry import CACHES, BudgetLike, find_entry, read_budget
from pyramid_cache.lab.terminal import device, one_budget, positive_int
from pyramid_cache.lab.weights import MODEL_NAME, fetch_default_model
from pyramid_cache.plot.held import kept_tokens


FULL_CACHE = DynamicCache.__name__
CACHE_CLASSES: dict[str, type[CompressedCache]] = {
    entry.cache_class.__name__: entry.cache_class for entry in CACHES.values()
}
CACHE_NAMES = (FULL_CACHE, *sorted(CACHE_CLASSES))


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `load_model` reads."""
    parser.add_argument("--model", help=f"folder or hub id of a causal language model (default: {MODEL_NAME})")
    parser.add_argument("--device", type=device, default="cpu", help="where the model runs (default: cpu)")
    parser.add_argument(
        "--threads", type=positive_int, metavar="N", help="threads of the CPU (default: torch's choice)"
    )


def load_model(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that the options name, ready for greedy decoding, and its tokenizer."""
    if options.threads:
        torch.set_num_threads(options.threads)
    loaded = loaded_model.load_model(
        options.model or fetch_default_model(), options.model or MODEL_NAME, options.device
    )
    model, tokenizer = loaded.model, loaded.tokenizer
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=sorted(loaded.end_token_ids) or None, pad_token_id=tokenizer.pad_token_id
    )
    return model, tokenizer


def cache_name(text: str) -> str:
    """Reads `--cache`: the class of a cache of this library or `DynamicCache`, by its own name or that of commands."""
    try:
        name = find_entry(text).cache_class.__name__
    except ValueError:
        name = ""
    if name not in CACHE_NAMES:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(CACHE_NAMES)}")
    return name


def setting(text: str) -> tuple[str, Any]:
    """Reads NAME=VALUE, where the value is a number, true, false, or text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    for read in (int, float, {"true": True, "false": False}.__getitem__):
        try:
            return name, read(value.lower())
        except (ValueError, KeyError):
            pass
    return name, value


def add_cache_options(parser: argparse.ArgumentParser, cache: str, budget: str) -> None:
    """Adds the options that `new_cache` reads. A script has a default cache, and a default budget for that cache."""
    parser.add_argument(
        "--cache",
        type=cache_name,
        default=cache,
        metavar="NAME",
        help=f"one of {', '.join(CACHE_NAMES)} (default: {cache})",
    )
    parser.add_argument(
        "--budget",
        type=one_budget,
        help="tokens per layer (512), a fraction of the prompt (0.4) or bytes (256MiB). For ShadowKVCache it "
        "is the tokens that a step attends to. "
        f"Default: {budget} for {cache}, the default of the class for others",
    )
    parser.add_argument(
        "--setting",
        type=setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a further argument of the cache, such as eviction_interval=8; may be given again",
    )
    parser.set_defaults(default_budgets={cache: read_budget(budget)})


def new_cache(options: argparse.Namespace, model: PreTrainedModel) -> Cache:
    """A new cache of the class that the options ask for."""
    budget = options.default_budgets.get(options.cache) if options.budget is None else options.budget
    return build_cache(options.cache, model, budget, **dict(options.setting))


def build_cache(name: str, model: PreTrainedModel, budget: BudgetLike | None = None, **settings: Any) -> Cache:
    """
    A new cache for a model, built from its config if it can be: whichever cache it is, `generate` sees all logits of a
    prompt.

    Args:
        name (`str`): One of `CACHE_NAMES`.
        budget (`float`, `int` or `str`, *optional*): As the class takes it, which may have a default.
        settings: Further arguments of the constructor.

    Raises:
        ValueError: The class does not take the budget or a setting.
    """
    if budget is not None:
        settings["budget"] = budget
    if name == FULL_CACHE:
        if settings:
            raise ValueError(f"{FULL_CACHE} keeps everything: leave out budget and settings, or name another cache.")
        return DynamicCache(config=model.config)
    reads_again = issubclass(CACHE_CLASSES[name], ReplayingCache)
    try:
        return CACHE_CLASSES[name](model if reads_again else model.config, **settings)
    except TypeError as error:  # an argument is missing, or the class has none of that name
        raise ValueError(f"{name} cannot be built from {settings}: {error}") from error


def num_kept(cache: Cache) -> int:
    """The tokens that the layer which keeps most holds."""
    return max(kept_tokens(cache))


def run(main: Callable[[], None]) -> None:
    """Runs a script. What it refuses becomes one line on stderr and the exit status 2."""
    try:
        main()
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
