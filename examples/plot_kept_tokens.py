"""Draw what caches keep of a novel, as docs/plots.md shows it.

    python examples/plot_kept_tokens.py --out docs

The default model reads the start of the novel that comes with the package, and continues it. The script writes two
pictures: `kept-tokens.png` shows what `PyramidCache` keeps, and `kept-scores.png` the scores of `H2OCache` over the
steps of the answer. With `--html FILE` it writes the text, coloured by how many layers of `PyramidCache` keep each
token.
"""

import argparse
from importlib.resources import files
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from pyramid_cache import H2OCache, PyramidCache
from pyramid_cache.lab.weights import fetch_default_model
from pyramid_cache.plot import ScoreRecorder


# Under a thousand tokens, so that the maps show each position on its own.
NUM_CHARACTERS = 3_600
NUM_NEW_TOKENS = 40


def main() -> None:
    """Run both caches and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id of a causal language model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--out", type=Path, default=Path("."), metavar="DIR", help="folder for the pictures")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the coloured text there")
    options = parser.parse_args()
    name = options.model or fetch_default_model()
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
    novel = (files("pyramid_cache.lab") / "data" / "pride_and_prejudice.txt").read_text(encoding="utf-8")
    inputs = tokenizer(novel[:NUM_CHARACTERS], return_tensors="pt")
    settings = {"max_new_tokens": NUM_NEW_TOKENS, "do_sample": False}
    options.out.mkdir(parents=True, exist_ok=True)

    cache = PyramidCache(model, budget=0.4)
    output = model.generate(**inputs, past_key_values=cache, **settings)
    cache.plot().savefig(options.out / "kept-tokens.png")
    if options.html is not None:
        text = cache.show(tokenizer, output)
        options.html.write_text(f'<!doctype html><meta charset="utf-8">{text._repr_html_()}', encoding="utf-8")

    cache = H2OCache(model, budget=0.2)
    recorder = ScoreRecorder(cache)
    model.generate(**inputs, past_key_values=cache, **settings, logits_processor=[recorder])
    recorder.plot().savefig(options.out / "kept-scores.png")


if __name__ == "__main__":
    main()
