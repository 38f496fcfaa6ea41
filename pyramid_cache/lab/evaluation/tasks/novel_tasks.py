"""
Tasks made from a novel; `TASK_KINDS` says what they are.

The four kinds of needles and the variables are those of RULER (arXiv 2404.06654, sections 3.1 and 3.2), with other
words: its keys and sentences are harder than a small model can tell apart. Answers of several values are asked for in
an order, so that their tokens can be scored in one forward pass; RULER takes them in any order from generated text.
RULER has one chain of variables; the second one here makes sure that not every variable of the text is right.

The pass key follows InfiniteBench (arXiv 2402.13718, Retrieve.PassKey), which has five digits. If context and question
are read before anything is evicted, the first token of an answer is that of the full cache. An answer of 64 tokens has
to be looked up.
"""

import itertools
import random
import string
from collections.abc import Sequence

from pyramid_cache.lab.evaluation.tasks.cases import Context, Question, Task
from pyramid_cache.lab.evaluation.tasks.haystack import Haystack, different_words
from pyramid_cache.lab.novel import PromptError


# SmolLM2-135M has trouble to tell one needle from another, and none to go on with a number that it has begun. Of some
# twenty wordings it answers this one best: the answer begins with the very words of the needle, no two persons share a
# word, no two numbers begin alike, and the digits of a number differ.
NEEDLE = "\n\nThe secret pass number of the {} is {}. Remember it.\n\n"
NEEDLE_QUESTION = "What is the secret pass number of the {} mentioned in the text?"
# It ends in a space, so that the first token of the answer is a digit.
ANSWER_BEGINNING = "The secret pass number of the {} is "
PERSONS = (
    *("old gatekeeper", "young gardener", "tall miller", "blind captain", "rich doctor", "poor teacher", "lame baker"),
    *("merry lawyer", "grey sailor", "bald painter", "sleepy farmer", "brave soldier", "quiet hunter", "lonely judge"),
    *("clever priest", "angry tailor"),
)
NUM_DIGITS = 5
# So many numbers differ in their first digit.
MAX_NEEDLES = 9
# Each first word of a person with each second one.
MAX_KEYS = len(PERSONS) ** 2
VALUES_QUESTION = "What are all {} secret pass numbers of the {}, in the order of the text?"
VALUES_BEGINNING = "The secret pass numbers of the {} are "
QUERIES_QUESTION = "What are the secret pass numbers of {} mentioned in the text, in this order?"
QUERIES_BEGINNING = "The secret pass numbers of {} are, in this order, "

KEY_LENGTH = 64
KEY_INSTRUCTION = "There is a pass key hidden in the following text. Memorize it.\n\n"
KEY_NEEDLE = "\n\nThe pass key is {}. Remember it.\n\n"
KEY_QUESTION = "What is the pass key mentioned in the text?"
KEY_BEGINNING = "The pass key is "

NUM_CHAINS = 2
CHAIN_LENGTH = 5
NAME_LENGTH = 5
CHAIN_INSTRUCTION = "Memorize and track the chains of variable assignments that are hidden in the following text.\n\n"
ASSIGNMENT = "\n\nVAR {} = {}\n\n"
CHAIN_QUESTION = (
    "Which variables are assigned the value {value} in the text above? Name all {count}, in the order of the text."
)
CHAIN_BEGINNING = "The {count} variables that are assigned the value {value} are:"

NUM_CONTINUED = 128


def choose_numbers(count: int, generator: random.Random) -> list[str]:
    """Numbers of five different digits each, no two of which begin alike."""
    firsts = generator.sample("123456789", count)
    rests = (generator.sample("0123456789".replace(first, ""), NUM_DIGITS - 1) for first in firsts)
    return [first + "".join(rest) for first, rest in zip(firsts, rests, strict=True)]


# A context, and of each person in it the number and its depth.
Told = tuple[list[int], list[tuple[str, str, float]]]


def hide_numbers(
    haystack: Haystack, task: Task, persons: Sequence[str], numbers: Sequence[str], generator: random.Random
) -> Told:
    """Tells the number of each person."""
    told = [haystack.encode(NEEDLE.format(*pair)) for pair in zip(persons, numbers, strict=True)]
    ids, depths = haystack.hide(task, told, generator)
    return ids, list(zip(persons, numbers, depths, strict=True))


def number_each(haystack: Haystack, task: Task, generator: random.Random) -> Told:
    """Tells a number each of N persons."""
    persons = generator.sample(PERSONS, task.count)
    return hide_numbers(haystack, task, persons, choose_numbers(task.count, generator), generator)


def ask_number(haystack: Haystack, person: str, number: str, depth: float, is_later: bool = False) -> Question:
    """The question about someone's number."""
    ids = haystack.question(NEEDLE_QUESTION.format(person), ANSWER_BEGINNING.format(person), is_later)
    return Question(ids, haystack.encode(number), depths=[depth])


def needles(haystack: Haystack, task: Task, generator: random.Random) -> Context:
    """A context of `needles-N-L`."""
    ids, told = number_each(haystack, task, generator)
    return Context(task.name, ids, [ask_number(haystack, *case) for case in told])


def turns(haystack: Haystack, task: Task, generator: random.Random) -> Context:
    """A context of `turns-N-L`: its questions are in another order than that of the text."""
    ids, told = number_each(haystack, task, generator)
    cases = generator.sample(told, len(told))
    asked = [ask_number(haystack, *case, is_later=turn > 0) for turn, case in enumerate(cases)]
    return Context(task.name, ids, asked, is_conversation=True)


def multi_key(haystack: Haystack, task: Task, generator: random.Random) -> Context:
    """A context of `needles-multikey-N-L`."""
    words = zip(*(person.split() for person in PERSONS), strict=True)
    persons = generator.sample([" ".join(pair) for pair in itertools.product(*words)], task.count)
    chosen = generator.sample(range(10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS), task.count)
    ids, told = hide_numbers(haystack, task, persons, list(map(str, chosen)), generator)
    return Context(task.name, ids, [ask_number(haystack, *told[generator.randrange(task.count)])])


def multi_value(haystack: Haystack, task: Task, generator: random.Random) -> Context:
    """A context of `needles-multivalue-N-L`."""
    person = generator.choice(PERSONS)
    numbers = choose_numbers(task.count, generator)
    ids, told = hide_numbers(haystack, task, [person] * task.count, numbers, generator)
    asked = haystack.question(VALUES_QUESTION.format(task.count, person), VALUES_BEGINNING.format(person))
    return Context(task.name, ids, [haystack.listing(asked, numbers, [depth for *_, depth in told])])


def multi_query(haystack: Haystack, task: Task, generator: random.Random) -> Context:
    """A context of `needles-multiquery-N-L`."""
    ids, told = number_each(haystack, task, generator)
    # In another order than that of the text.
    persons, numbers, depths = zip(*generator.sample(told, len(told)), strict=True)
    *first, last = [f"the {person}" for person in persons]
    listed = f"{', '.join(first)} and {last}"
    asked = haystack.question(QUERIES_QUESTION.format(listed), QUERIES_BEGINNING.format(listed))
    return Context(task.name, ids, [haystack.listing(asked, numbers, depths)])


def passkey(haystack: Haystack, task: Task, generator: random.Random) -> Context:
    """A context of `passkey-L`."""
    digits = "".join(generator.choices(string.digits, k=KEY_LENGTH))
    ids, depths = haystack.hide(task, [haystack.encode(KEY_NEEDLE.format(digits))], generator, KEY_INSTRUCTION)
    asked = haystack.question(KEY_QUESTION, KEY_BEGINNING)
    return Context(task.name, ids, [Question(asked, haystack.encode(digits), depths=depths)])


def variables(haystack: Haystack, task: Task, generator: random.Random) -> Context:
    """A context of `variables-L`: `VAR X1 = 12345` comes first, then `VAR X2 = VAR X1` and so on."""
    names = different_words(string.ascii_uppercase, NAME_LENGTH, NUM_CHAINS * CHAIN_LENGTH, generator)
    values = [str(value) for value in generator.sample(range(10_000, 100_000), NUM_CHAINS)]
    chains = [names[chain * CHAIN_LENGTH :][:CHAIN_LENGTH] for chain in range(NUM_CHAINS)]
    # Which chain goes on at each place of the text.
    order = generator.sample([chain for chain in range(NUM_CHAINS) for _ in range(CHAIN_LENGTH)], len(names))
    assignments = []
    for place, chain in enumerate(order):
        hop = order[:place].count(chain)
        value = f"VAR {chains[chain][hop - 1]}" if hop else values[chain]
        assignments.append(haystack.encode(ASSIGNMENT.format(chains[chain][hop], value)))
    ids, depths = haystack.hide(task, assignments, generator, CHAIN_INSTRUCTION)
    words = {"count": CHAIN_LENGTH, "value": values[0]}
    asked = haystack.question(CHAIN_QUESTION.format(**words), CHAIN_BEGINNING.format(**words))
    places = [depth for depth, chain in zip(depths, order, strict=True) if chain == 0]
    return Context(task.name, ids, [haystack.listing(asked, [f" {name}" for name in chains[0]], places, ",")])


def perplexity(haystack: Haystack, task: Task, generator: random.Random) -> Context:
    """
    A context of `perplexity-L`, without a chat template: its question is one more token of the text, and the answer
    the 128 behind that.
    """
    bos_id = haystack.tokenizer.bos_token_id
    before = [] if bos_id is None else [bos_id]
    num_text = task.num_tokens - len(before)
    num_starts = len(haystack.novel) - num_text - NUM_CONTINUED
    if num_text < 1 or num_starts < 1:
        raise PromptError(
            f"The task {task.name!r} cannot be: the novel has {len(haystack.novel)} tokens, of which "
            f"{NUM_CONTINUED + 1} come behind the context. Choose a shorter one."
        )
    start = generator.randrange(num_starts)
    stop = start + num_text
    later = haystack.novel[stop : stop + 1 + NUM_CONTINUED]
    return Context(task.name, before + haystack.novel[start:stop], [Question(later[:1], later[1:])])
