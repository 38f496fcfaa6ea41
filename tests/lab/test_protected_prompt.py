"""What a protected system prompt is good for, with a real model."""

from importlib import resources
from typing import Any

import pytest
import torch
from test_examples import default_model
from transformers import DynamicCache

from pyramid_cache import H2OCache, KeyDiffCache, SnapKVCache


SYSTEM = "You are the assistant of a bakery. The bakery opens at nine and sells rye bread."
QUESTION = "When does the bakery open?"


@pytest.mark.slow
@pytest.mark.parametrize("cache_class", [SnapKVCache, KeyDiffCache, H2OCache])
def test_what_the_system_prompt_says_is_known_behind_a_long_text(cache_class: Any) -> None:
    """As with a DynamicCache, at a tenth of the tokens; unprotected it is lost."""
    model, tokenizer = default_model()
    novel = resources.files("pyramid_cache.lab").joinpath("data/pride_and_prejudice.txt").read_text(encoding="utf-8")
    text = tokenizer.decode(tokenizer(novel[20_000:30_000]).input_ids[:600])
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"Read this text.\n\n{text}"},
        {"role": "assistant", "content": "I have read it."},
        {"role": "user", "content": QUESTION},
    ]
    options = {"return_dict": True, "return_tensors": "pt"}
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
    system = tokenizer.apply_chat_template(messages[:1], **options).input_ids
    length = inputs.input_ids.shape[1]
    assert torch.equal(inputs.input_ids[:, : system.shape[1]], system) and length > 600

    def answer(cache: Any) -> str:
        output = model.generate(**inputs, past_key_values=cache, max_new_tokens=16, do_sample=False)
        return tokenizer.decode(output[0, length:], skip_special_tokens=True)

    assert "nine" in answer(DynamicCache(config=model.config))
    assert "nine" in answer(cache_class(model.config, 0.1, protect=system.shape[1]))
    assert "nine" not in answer(cache_class(model.config, 0.1))
