"""
The recall model: a small Llama that has learned to look up the values of keys (`examples/train_recall_model.py`).

It reads pairs of a key and its value, and behind a key that it has read it says the value, unless a cache has dropped
it: quality is tested in seconds, with retrieval heads that were learned.
"""

import random
from importlib import resources
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


# Token ids: keys come first, then values.
NUM_KEYS = 256
NUM_VALUES = 256
MAX_TOKENS = 512
NAME = "recall model"


def load_recall_model(dtype: torch.dtype = torch.float32) -> "LlamaForCausalLM":
    """The trained model that is shipped with the package, for evaluation."""
    from transformers import LlamaForCausalLM

    with resources.as_file(resources.files("pyramid_cache.lab").joinpath("data/recall_model")) as folder:
        return LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def random_pairs(num_pairs: int, generator: random.Random) -> tuple[list[int], list[int]]:
    """Token ids of that many different keys, in random order, and of a random value for each."""
    keys = generator.sample(range(NUM_KEYS), num_pairs)
    return keys, [NUM_KEYS + generator.randrange(NUM_VALUES) for _ in keys]
