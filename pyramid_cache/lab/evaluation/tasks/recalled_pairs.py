"""`recall-L`: L tokens of key-value pairs, and questions about up to 64 of the keys, for the recall model."""

import random

from pyramid_cache.lab.evaluation.recall import random_pairs
from pyramid_cache.lab.evaluation.tasks.cases import Context, Question


MAX_QUESTIONS = 64


def recalled_pairs(task: str, num_tokens: int, generator: random.Random) -> Context:
    """A stream of pairs of a key and its value, no key twice. A question is one of the keys, its answer the value."""
    pairs = list(zip(*random_pairs(num_tokens // 2, generator), strict=True))
    ids = [token_id for pair in pairs for token_id in pair]
    asked = generator.sample(pairs, min(len(pairs), MAX_QUESTIONS))
    questions = [Question([key], [value], depths=[2 * pairs.index((key, value)) / len(ids)]) for key, value in asked]
    return Context(task, ids, questions)
