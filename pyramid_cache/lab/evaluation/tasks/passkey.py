"""
`passkey-L`: a pass key of 64 digits in a novel, after InfiniteBench (arXiv 2402.13718, Retrieve.PassKey, of five digits).

When context and question are read before anything is evicted, the first token of an answer is that of the full cache. Of an
answer of one token or two a cache that evicts behind the prompt has lost little: 64 tokens have to be looked up.
"""

import random

from pyramid_cache.lab.evaluation.tasks.cases import Context, Question
from pyramid_cache.lab.evaluation.tasks.haystack import Haystack


NUM_DIGITS = 64
INSTRUCTION = "There is a pass key hidden in the following text. Memorize it.\n\n"
NEEDLE = "\n\nThe pass key is {digits}. Remember it.\n\n"
QUESTION = "What is the pass key mentioned in the text?"
BEGINNING = "The pass key is "


def passkey(haystack: Haystack, task: str, count: int, num_tokens: int, generator: random.Random) -> Context:
    """A context of `passkey-L`."""
    digits = "".join(generator.choices("0123456789", k=NUM_DIGITS))
    needles = [haystack.encode(NEEDLE.format(digits=digits))]
    ids, depths = haystack.hide(task, num_tokens, needles, generator, INSTRUCTION)
    return Context(
        task, ids, [Question(haystack.question(QUESTION, BEGINNING), haystack.encode(digits), depths=depths)]
    )
