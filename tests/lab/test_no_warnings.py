"""Measurements call the argument of a cache as transformers does, so that its users read no warning of it."""

import warnings

from models import random_tokens, tiny_model
from modes import tiny_tokenizer
from transformers import DynamicCache

from pyramid_cache.lab.demo.timed_answers import generate
from pyramid_cache.lab.evaluation.evaluator import Evaluation
from pyramid_cache.lab.evaluation.tasks import Context, Question
from pyramid_cache.lab.profile.activations import measure_text
from pyramid_cache.lab.registry import CACHES
from pyramid_cache.lab.weights import no_progress


def test_measurements_do_not_warn_of_what_their_users_never_wrote() -> None:
    """What an evaluation reads, asks and answers itself, what a profile reads, and what the demo generates."""
    model, prompt, later = tiny_model("llama"), random_tokens(2, 40, seed=70), random_tokens(2, 3, seed=71)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "`past_key_values`", FutureWarning)
        generate(model, prompt, DynamicCache(config=model.config), 2)
        measure_text(model, tiny_tokenizer(), prompt[:1], window_size=8)
        context = Context("made-up", prompt[0].tolist(), [Question(later[0].tolist(), later[1].tolist())])
        caches = {name: CACHES[name] for name in ("snapkv", "streaming")}
        results = Evaluation(model, caches, [0.5]).run([context], no_progress)
    assert {result.cache for result in results} == {"dynamic", "snapkv", "streaming"}
