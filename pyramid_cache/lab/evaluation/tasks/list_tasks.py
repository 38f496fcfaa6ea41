"""
Tasks made from lists; `TASK_KINDS` says what they are.

The words follow RULER (arXiv 2404.06654, section 3.3), the JSON object InfiniteBench (arXiv 2402.13718, Retrieve.KV).
RULER takes the words in any order from generated text. Here their tokens are scored in one forward pass, so that they
are asked for in an order: common ones, which are equally frequent, as they first come, and the others by frequency.
"""

import random
import re
import string
import uuid
from collections.abc import Sequence

from pyramid_cache.lab.evaluation.recall import random_pairs
from pyramid_cache.lab.evaluation.tasks.cases import Context, Question, Task
from pyramid_cache.lab.evaluation.tasks.haystack import Haystack, different_words
from pyramid_cache.lab.novel import PromptError, read_text


NUM_COMMON = 10
# How often a common word comes, and another one: as in RULER, and in contexts of less than `LONG_CONTEXT` tokens less
# often.
REPEATS, SHORT_REPEATS = (30, 3), (10, 1)
LONG_CONTEXT = 4096
COMMON_INSTRUCTION = (
    "Below is a numbered list of words. Some of them appear more often than others. Memorize the ones that appear "
    "most often.\n\n"
)
COMMON_QUESTION = "What are the 10 most common words in the list above, in the order in which they first appear?"
COMMON_BEGINNING = "The 10 most common words in the list are:"

ZIPF_EXPONENT = 2.0
NUM_FREQUENT = 3
WORD_LENGTH = 6
TOKENS_PER_WORD = 50
DOTS = "...."
FREQUENT_INSTRUCTION = (
    "Read the following coded text and keep count of each coded word. Find the three most frequent coded words.\n\n"
)
FREQUENT_QUESTION = (
    "What are the three most frequent words in the coded text above, the most frequent one first? "
    "Ignore the dots '....'."
)
FREQUENT_BEGINNING = "The three most frequent words in the coded text are:"

PAIRS_INSTRUCTION = "Extract the value of the key that is asked for from the JSON object below.\n\n"
PAIRS_QUESTION = 'What is the value of the key "{}"?'
# It ends in a quotation mark, so that the answer begins with the value.
PAIRS_BEGINNING = 'The value of the key "{}" is "'
MIN_PAIRS = 2

MAX_RECALL_QUESTIONS = 64


def common_words(haystack: Haystack, task: Task, generator: random.Random) -> Context:
    """A context of `common-words-L`."""
    before = haystack.before + haystack.encode(COMMON_INSTRUCTION)
    repeats = REPEATS if task.num_tokens >= LONG_CONTEXT else SHORT_REPEATS
    known = sorted(set(re.findall(r"\b[a-z]{4,10}\b", read_text())))
    words = generator.sample(known, len(known))
    listed: list[str] = []
    num_left = task.num_tokens - len(before)
    for index, word in enumerate(words):
        more = repeats[0] if index < NUM_COMMON else repeats[1]
        numbers = range(len(listed) + 1, len(listed) + 1 + more)
        num_left -= sum(len(entry_of(haystack, number, word)) for number in numbers)
        if num_left < 0:
            break
        listed += [word] * more
    if len(listed) <= NUM_COMMON * repeats[0]:
        raise too_short(task, f"{NUM_COMMON} words {repeats[0]} times each")
    generator.shuffle(listed)
    ids, depths = joined(before, [entry_of(haystack, *entry) for entry in enumerate(listed, start=1)])
    common = sorted(words[:NUM_COMMON], key=listed.index)
    asked = haystack.question(COMMON_QUESTION, COMMON_BEGINNING)
    places = [depths[listed.index(word)] for word in common]
    return Context(task.name, ids, [haystack.listing(asked, [f" {word}" for word in common], places, ",")])


def entry_of(haystack: Haystack, number: int, word: str) -> list[int]:
    """A line of a numbered list, in which words have the same tokens everywhere."""
    return haystack.encode(f"{number}.") + haystack.encode(f" {word}\n")


def frequent_words(haystack: Haystack, task: Task, generator: random.Random) -> Context:
    """A context of `frequent-words-L`: frequencies follow Zipf's law, and the most frequent word is dots."""
    before = haystack.before + haystack.encode(FREQUENT_INSTRUCTION)
    num_words = max(task.num_tokens // TOKENS_PER_WORD, 1 + NUM_FREQUENT + 1)
    words = [DOTS, *different_words(string.ascii_lowercase, WORD_LENGTH, num_words - 1, generator)]
    tokens = [haystack.encode(f" {word}") for word in words]
    room = task.num_tokens - len(before)
    # The most words that fit, between what is known to fit and what is known not to.
    fits, exceeds = 0, 2 * task.num_tokens
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        counts = zipf_counts(middle, len(words))
        num_taken = sum(repeats * len(word) for repeats, word in zip(counts, tokens, strict=True))
        fits, exceeds = (middle, exceeds) if num_taken <= room else (fits, middle)
    counts = zipf_counts(fits, len(words))
    asked_for = range(1, 1 + NUM_FREQUENT)
    if any(counts[rank] <= counts[rank + 1] for rank in asked_for):
        raise too_short(task, "frequencies that differ")
    order = [rank for rank, repeats in enumerate(counts) for _ in range(repeats)]
    generator.shuffle(order)
    ids, depths = joined(before, [tokens[rank] for rank in order])
    asked = haystack.question(FREQUENT_QUESTION, FREQUENT_BEGINNING)
    places = [depths[order.index(rank)] for rank in asked_for]
    return Context(task.name, ids, [haystack.listing(asked, [f" {words[rank]}" for rank in asked_for], places, ",")])


def zipf_counts(num_words: int, num_different: int) -> list[int]:
    """How often each rank comes in so many words: in proportion to `rank ** -ZIPF_EXPONENT`, rounded down."""
    shares = [rank**-ZIPF_EXPONENT for rank in range(1, num_different + 1)]
    return [int(num_words * share / sum(shares)) for share in shares]


def key_value(haystack: Haystack, task: Task, generator: random.Random) -> Context:
    """A context of `key-value-L`."""
    before = haystack.before + haystack.encode(PAIRS_INSTRUCTION + "{")
    ending = haystack.encode("}")
    num_left = task.num_tokens - len(before) - len(ending)
    pairs: list[tuple[str, str]] = []
    entries: list[list[int]] = []
    while True:
        key, value = (str(uuid.UUID(int=generator.getrandbits(128), version=4)) for _ in range(2))
        entry = haystack.encode(f'{", " if pairs else ""}"{key}": "{value}"')
        num_left -= len(entry)
        if num_left < 0:
            break
        pairs.append((key, value))
        entries.append(entry)
    if len(pairs) < MIN_PAIRS:
        raise too_short(task, f"{MIN_PAIRS} pairs")
    ids, depths = joined(before, [*entries, ending])
    chosen = generator.randrange(len(pairs))
    key, value = pairs[chosen]
    asked = haystack.question(PAIRS_QUESTION.format(key), PAIRS_BEGINNING.format(key))
    return Context(task.name, ids, [Question(asked, haystack.encode(value), depths=[depths[chosen]])])


def recalled_pairs(haystack: Haystack | None, task: Task, generator: random.Random) -> Context:
    """A context of `recall-L`: no key comes twice. A question is one of the keys, its answer the value."""
    pairs = list(zip(*random_pairs(task.num_tokens // 2, generator), strict=True))
    ids = [token_id for pair in pairs for token_id in pair]
    asked = generator.sample(pairs, min(len(pairs), MAX_RECALL_QUESTIONS))
    questions = [Question([key], [value], depths=[2 * pairs.index((key, value)) / len(ids)]) for key, value in asked]
    return Context(task.name, ids, questions)


def joined(before: list[int], entries: Sequence[list[int]]) -> tuple[list[int], list[float]]:
    """A context of entries one behind the other, and the share of it that comes before each."""
    ids, starts = list(before), []
    for entry in entries:
        starts.append(len(ids))
        ids += entry
    return ids, [start / len(ids) for start in starts]


def too_short(task: Task, what: str) -> PromptError:
    """For a length that has no room."""
    return PromptError(f"The task {task.name!r} cannot be: its context has no room for {what}. Choose a longer one.")
