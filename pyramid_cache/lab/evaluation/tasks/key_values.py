"""
`key-value-L`: a JSON object of random pairs, and the value of one key, after InfiniteBench (arXiv 2402.13718, Retrieve.KV).

Keys and values are UUIDs, and there are as many pairs as the length has room for.
"""

import random
import uuid

from pyramid_cache.lab.evaluation.tasks.cases import Context, Question
from pyramid_cache.lab.evaluation.tasks.haystack import Haystack
from pyramid_cache.lab.evaluation.tasks.words import joined, too_short


INSTRUCTION = "Extract the value of the key that is asked for from the JSON object below.\n\n"
QUESTION = 'What is the value of the key "{key}"?'
# It ends in a quotation mark, so that the answer begins with the value.
BEGINNING = 'The value of the key "{key}" is "'
MIN_PAIRS = 2


def key_value(haystack: Haystack, task: str, count: int, num_tokens: int, generator: random.Random) -> Context:
    """A context of `key-value-L`."""
    before = haystack.before + haystack.encode(INSTRUCTION + "{")
    ending = haystack.encode("}")
    num_left = num_tokens - len(before) - len(ending)
    pairs: list[tuple[str, str]] = []
    entries: list[list[int]] = []
    while True:
        key, value = random_uuid(generator), random_uuid(generator)
        entry = haystack.encode(f'{", " if pairs else ""}"{key}": "{value}"')
        num_left -= len(entry)
        if num_left < 0:
            break
        pairs.append((key, value))
        entries.append(entry)
    if len(pairs) < MIN_PAIRS:
        raise too_short(task, f"{MIN_PAIRS} pairs")
    ids, depths = joined(before, [*entries, ending])
    asked = generator.randrange(len(pairs))
    key, value = pairs[asked]
    ids_of_question = haystack.question(QUESTION.format(key=key), BEGINNING.format(key=key))
    return Context(task, ids, [Question(ids_of_question, haystack.encode(value), depths=[depths[asked]])])


def random_uuid(generator: random.Random) -> str:
    return str(uuid.UUID(int=generator.getrandbits(128), version=4))
