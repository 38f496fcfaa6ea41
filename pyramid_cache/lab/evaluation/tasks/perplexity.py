"""
`perplexity-L`: how well a model goes on with a novel of which it has read L tokens.

The perplexity is `exp(-log_likelihood)` of the score, whose mean is over tokens; each context has as many. The text is given as it
is, without the frame of a chat template.
"""

import random

from pyramid_cache.lab.demo.planted_number import PromptError
from pyramid_cache.lab.evaluation.tasks.cases import Context, Question
from pyramid_cache.lab.evaluation.tasks.haystack import Haystack


NUM_CONTINUED = 128


def perplexity(haystack: Haystack, task: str, count: int, num_tokens: int, generator: random.Random) -> Context:
    """A context of `perplexity-L`: its question is one more token of the text, and the answer the 128 behind that."""
    bos_id = haystack.tokenizer.bos_token_id
    before = [] if bos_id is None else [bos_id]
    num_text = num_tokens - len(before)
    num_starts = len(haystack.novel) - num_text - NUM_CONTINUED
    if num_text < 1 or num_starts < 1:
        raise PromptError(
            f"The task {task!r} cannot be: the novel has {len(haystack.novel)} tokens, of which {NUM_CONTINUED + 1} come behind the "
            "context. Choose a shorter one."
        )
    start = generator.randrange(num_starts)
    stop = start + num_text
    later = haystack.novel[stop : stop + 1 + NUM_CONTINUED]
    return Context(task, before + haystack.novel[start:stop], [Question(later[:1], later[1:])])
