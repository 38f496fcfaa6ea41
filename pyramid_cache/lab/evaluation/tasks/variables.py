"""
Variable tracking, after RULER (arXiv 2404.06654, section 3.2): a chain of assignments in a novel, and which variables have the
value.

`VAR X1 = 12345` comes first, then `VAR X2 = VAR X1` and so on; a second chain with another value is in between, so that not every
variable of the text is one of the answer. RULER takes one chain and repeated sentences for a text; it takes the variables in
any order from generated text, while here they are asked for in the order of the text, which is that of the chain.
"""

import random
import string

from pyramid_cache.lab.evaluation.tasks.cases import Context
from pyramid_cache.lab.evaluation.tasks.haystack import Haystack


NUM_CHAINS = 2
NUM_HOPS = 4
NAME_LENGTH = 5

INSTRUCTION = "Memorize and track the chains of variable assignments that are hidden in the following text.\n\n"
ASSIGNMENT = "\n\nVAR {name} = {value}\n\n"
QUESTION = (
    "Which variables are assigned the value {value} in the text above? Name all {count}, in the order of the text."
)
BEGINNING = "The {count} variables that are assigned the value {value} are:"


def variables(haystack: Haystack, task: str, count: int, num_tokens: int, generator: random.Random) -> Context:
    """A context of `variables-L`."""
    num_names = NUM_HOPS + 1
    names: list[str] = []
    while len(names) < NUM_CHAINS * num_names:
        name = "".join(generator.choices(string.ascii_uppercase, k=NAME_LENGTH))
        names += [] if name in names else [name]
    values = [str(value) for value in generator.sample(range(10_000, 100_000), NUM_CHAINS)]
    chains = [names[chain * num_names :][:num_names] for chain in range(NUM_CHAINS)]
    # Which chain goes on at each place of the text.
    order = generator.sample([chain for chain in range(NUM_CHAINS) for _ in range(num_names)], len(names))
    texts = []
    for place, chain in enumerate(order):
        hop = order[:place].count(chain)
        value = f"VAR {chains[chain][hop - 1]}" if hop else values[chain]
        texts.append(ASSIGNMENT.format(name=chains[chain][hop], value=value))
    ids, depths = haystack.hide(task, num_tokens, [haystack.encode(text) for text in texts], generator, INSTRUCTION)
    words = {"count": num_names, "value": values[0]}
    asked = haystack.question(QUESTION.format(**words), BEGINNING.format(**words))
    places = [depth for depth, chain in zip(depths, order, strict=True) if chain == 0]
    return Context(task, ids, [haystack.listing(asked, [f" {name}" for name in chains[0]], places, ",")])
