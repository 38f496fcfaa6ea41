"""
Numbers hidden in a novel.

- `needles-N-L`: N persons have a number each, and there is a question about each of them;
- `needles-multikey-N-L`: the same, of up to 256 persons of whom many share a word, and a question about one;
- `needles-multivalue-N-L`: one person has N numbers, and one question asks for all of them;
- `needles-multiquery-N-L`: N persons have a number each, and one question asks for all of them;
- `turns-N-L`: as `needles-N-L`, but the questions are turns of one conversation.

The four kinds of needles are those of RULER (arXiv 2404.06654, section 3.1), with other words: its keys and sentences are
harder than a small model can tell apart. Answers of several numbers are asked for in an order, so that their tokens can be
scored in one forward pass; RULER takes them in any order from generated text.
"""

import itertools
import random

from pyramid_cache.lab.evaluation.tasks.cases import Context, Question
from pyramid_cache.lab.evaluation.tasks.haystack import Haystack


# SmolLM2-135M has trouble to tell one needle from another, and none to go on with a number that it has begun. Of some twenty
# wordings it answers this one best: the answer begins with the very words of the needle, no two persons share a word, no two
# numbers begin alike, and the digits of a number differ.
NEEDLE = "\n\nThe secret pass number of the {person} is {number}. Remember it.\n\n"
NEEDLE_QUESTION = "What is the secret pass number of the {person} mentioned in the text?"
# It ends in a space, so that the first token of the answer is a digit.
ANSWER_BEGINNING = "The secret pass number of the {person} is "
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

VALUES_QUESTION = "What are all {count} secret pass numbers of the {person}, in the order of the text?"
VALUES_BEGINNING = "The secret pass numbers of the {person} are "
QUERIES_QUESTION = "What are the secret pass numbers of {persons} mentioned in the text, in this order?"
QUERIES_BEGINNING = "The secret pass numbers of {persons} are, in this order, "


def choose_numbers(count: int, generator: random.Random) -> list[str]:
    """Numbers of five different digits each, no two of which begin alike."""
    first_digits = generator.sample("123456789", count)
    return [
        first + "".join(generator.sample("0123456789".replace(first, ""), NUM_DIGITS - 1)) for first in first_digits
    ]


def needle(haystack: Haystack, person: str, number: str) -> list[int]:
    """The tokens of the sentence that tells someone's number."""
    return haystack.encode(NEEDLE.format(person=person, number=number))


def question(haystack: Haystack, person: str, number: str, depth: float, is_later: bool = False) -> Question:
    """The question about someone's number."""
    ask = haystack.later_question if is_later else haystack.question
    ids = ask(NEEDLE_QUESTION.format(person=person), ANSWER_BEGINNING.format(person=person))
    return Question(ids, haystack.encode(number), depths=[depth])


def single(haystack: Haystack, task: str, count: int, num_tokens: int, generator: random.Random) -> Context:
    """A context of `needles-N-L`."""
    persons = generator.sample(PERSONS, count)
    numbers = choose_numbers(count, generator)
    needles = [needle(haystack, *pair) for pair in zip(persons, numbers, strict=True)]
    ids, depths = haystack.hide(task, num_tokens, needles, generator)
    cases = zip(persons, numbers, depths, strict=True)
    return Context(task, ids, [question(haystack, *case) for case in cases])


def multi_key(haystack: Haystack, task: str, count: int, num_tokens: int, generator: random.Random) -> Context:
    """A context of `needles-multikey-N-L`."""
    words = zip(*(person.split() for person in PERSONS), strict=True)
    persons = generator.sample([" ".join(pair) for pair in itertools.product(*words)], count)
    numbers = [str(number) for number in generator.sample(range(10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS), count)]
    needles = [needle(haystack, *pair) for pair in zip(persons, numbers, strict=True)]
    ids, depths = haystack.hide(task, num_tokens, needles, generator)
    asked = generator.randrange(count)
    return Context(task, ids, [question(haystack, persons[asked], numbers[asked], depths[asked])])


def multi_value(haystack: Haystack, task: str, count: int, num_tokens: int, generator: random.Random) -> Context:
    """A context of `needles-multivalue-N-L`."""
    person = generator.choice(PERSONS)
    numbers = choose_numbers(count, generator)
    ids, depths = haystack.hide(task, num_tokens, [needle(haystack, person, number) for number in numbers], generator)
    asked = haystack.question(
        VALUES_QUESTION.format(count=count, person=person), VALUES_BEGINNING.format(person=person)
    )
    return Context(task, ids, [haystack.listing(asked, numbers, depths)])


def multi_query(haystack: Haystack, task: str, count: int, num_tokens: int, generator: random.Random) -> Context:
    """A context of `needles-multiquery-N-L`."""
    persons = generator.sample(PERSONS, count)
    numbers = choose_numbers(count, generator)
    needles = [needle(haystack, *pair) for pair in zip(persons, numbers, strict=True)]
    ids, depths = haystack.hide(task, num_tokens, needles, generator)
    # In another order than that of the text.
    order = generator.sample(range(count), count)
    names = [f"the {persons[index]}" for index in order]
    listed = " and ".join([", ".join(names[:-1]), names[-1]])
    asked = haystack.question(QUERIES_QUESTION.format(persons=listed), QUERIES_BEGINNING.format(persons=listed))
    values, places = [numbers[index] for index in order], [depths[index] for index in order]
    return Context(task, ids, [haystack.listing(asked, values, places)])


def turns(haystack: Haystack, task: str, count: int, num_tokens: int, generator: random.Random) -> Context:
    """A context of `turns-N-L`: its questions are in another order than that of the text."""
    persons = generator.sample(PERSONS, count)
    numbers = choose_numbers(count, generator)
    needles = [needle(haystack, *pair) for pair in zip(persons, numbers, strict=True)]
    ids, depths = haystack.hide(task, num_tokens, needles, generator)
    cases = generator.sample(list(zip(persons, numbers, depths, strict=True)), count)
    asked = [question(haystack, *case, is_later=turn > 0) for turn, case in enumerate(cases)]
    return Context(task, ids, asked, is_conversation=True)
