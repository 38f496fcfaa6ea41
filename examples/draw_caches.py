"""Draw which positions each cache holds, for its page in docs/caches.

    python examples/draw_caches.py --out docs/caches

SmolLM2-135M-Instruct reads 1,024 tokens of a novel with each cache in turn, a fact in their middle and a question
about it at their end, and answers with 48 tokens. This takes five minutes on one core. The metadata of each picture
has, as JSON, the call that built the cache and the tokens that each layer holds.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import pyramid_cache
from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.lab.demo.demo_report import draw_positions
from pyramid_cache.lab.loaded_model import LoadedModel, load_model
from pyramid_cache.lab.novel import end_of_sentence, frame, read_text
from pyramid_cache.lab.registry import CACHES
from pyramid_cache.lab.weights import MODEL_NAME, fetch_default_model
from pyramid_cache.plot.held import kept_positions, kept_tokens


FACT = "\n\nThe secret pass number of the old gatekeeper is 60494. Remember it.\n\n"
QUESTION = "\n\nWhat is the secret pass number of the old gatekeeper mentioned in the text?"
PROMPT_TOKENS = 1024
NEW_TOKENS = 48
PAGES = Path(__file__).parents[1] / "docs" / "caches"
# By class, what the constructor is given: a quarter of the prompt, except where a budget is none of the whole prompt.
SETTINGS: dict[str, dict[str, Any]] = {entry.cache_class.__name__: {"budget": 0.25} for entry in CACHES.values()} | {
    "StreamingLLMCache": {"budget": 256},
    "KIVICache": {"nbits": 4},
    "MiniCache": {"outliers": 0.05},
    "KVSharerCache": {"sharing": {2: 1}},
    "ShadowKVCache": {"budget": 128, "rank": 96, "num_outlier_chunks": 8},
}
BUILT_FROM_MODEL = {entry.cache_class.__name__ for entry in CACHES.values() if entry.from_model} - {"KVSharerCache"}


def file_name(cache_name: str) -> str:
    """The picture of a class is named as its page: `PyramidKVCache` has `pyramidkv.png` beside `pyramidkv.md`."""
    [page] = [page for page in PAGES.glob("*.md") if page.read_text().startswith(f"# {cache_name}\n")]
    return f"{page.stem}.png"


def call_of(cache_name: str) -> str:
    """The call that builds the cache of a picture, as the pages show it."""
    source = "model" if cache_name in BUILT_FROM_MODEL else "model.config"
    settings = ", ".join(f"{name}={value!r}" for name, value in SETTINGS[cache_name].items())
    return f"{cache_name}({source}, {settings})"


def build(cache_name: str, model: PreTrainedModel) -> CompressedCache:
    """A new cache of a class of the library."""
    source = model if cache_name in BUILT_FROM_MODEL else model.config
    return getattr(pyramid_cache, cache_name)(source, **SETTINGS[cache_name])


def build_prompt(tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, tuple[int, int]]:
    """The prompt `(1, PROMPT_TOKENS)`, and where its fact starts and ends."""
    before, after = frame(tokenizer, QUESTION)
    text, fact = (
        tokenizer(each, add_special_tokens=False, verbose=False)["input_ids"] for each in (read_text(), FACT)
    )
    text = text[: PROMPT_TOKENS - len(before) - len(fact) - len(after)]
    middle = end_of_sentence(tokenizer, text)
    start = len(before) + middle
    return torch.tensor([before + text[:middle] + fact + text[middle:] + after]), (start, start + len(fact))


@torch.no_grad()
def fill(cache: CompressedCache, loaded: LoadedModel, prompt: torch.Tensor) -> None:
    """Reads the prompt and answers."""
    loaded.model.generate(prompt, **{CACHE_ARGUMENT: cache}, max_new_tokens=NEW_TOKENS)


def draw(cache_name: str, shares: torch.Tensor, held: list[int], fact_span: tuple[int, int], path: Path) -> None:
    """
    Writes a picture.

    Args:
        shares (`torch.Tensor`): `(layers, positions)`, the share of the KV heads that hold each position.
        held (`list[int]`): The tokens that each layer holds.
        fact_span (`tuple[int, int]`): Where the fact starts and ends.
        path (`Path`): Where the PNG goes.
    """
    figure = Figure(figsize=(7.2, 2.5), layout="constrained")
    axes = figure.subplots()
    image = draw_positions(axes, shares, fact_span, PROMPT_TOKENS)
    axes.set_title(call_of(cache_name), fontsize="medium", pad=10)
    axes.set_xlabel(
        "position (red bar: the fact that is asked for; dotted line: where the answer begins)", fontsize="small"
    )
    axes.set_ylabel("layer", fontsize="small")
    axes.tick_params(labelsize="small")
    bar = figure.colorbar(image, ax=axes, ticks=[0, 1])
    bar.set_label("share of heads", fontsize="small")
    bar.ax.tick_params(labelsize="small")
    description = {
        "model": MODEL_NAME,
        "call": call_of(cache_name),
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "held": held,
    }
    figure.savefig(path, dpi=110, metadata={"Description": json.dumps(description), "Software": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws the pictures that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--caches", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default: all")
    parser.add_argument("--threads", type=int, default=1, help="of torch; default: 1")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    loaded = load_model(fetch_default_model(), MODEL_NAME, torch.device("cpu"))
    prompt, fact_span = build_prompt(loaded.tokenizer)
    for cache_name in options.caches:
        cache = build(cache_name, loaded.model)
        fill(cache, loaded, prompt)
        path = options.out / file_name(cache_name)
        # The last token that was generated has not been fed.
        shares = kept_positions(cache, cache.get_seq_length())
        draw(cache_name, shares, kept_tokens(cache), fact_span, path)
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
