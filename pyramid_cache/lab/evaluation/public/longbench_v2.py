"""
LongBench-v2 (arXiv 2412.15204): the hub's THUDM/LongBench-v2, split `train`, or its `data.json`.

Columns: `context`, `question`, `choice_A` to `choice_D` and `answer` (the letter), among others. The letter is read from a generated
answer of up to 128 tokens as `extract_answer` in `pred.py` of github.com/THUDM/LongBench does.
"""

from typing import Any

from pyramid_cache.lab.evaluation.public.example import Example


LETTERS = "ABCD"
COLUMNS = ("context", "question", *(f"choice_{letter}" for letter in LETTERS), "answer")
SPLIT = "train"


def read(row: dict[str, Any], name: str) -> Example:
    """The example of a row."""
    options = "\n".join(f"({letter}) {row[f'choice_{letter}'].strip()}" for letter in LETTERS)
    question = (
        f"{row['question'].strip()}\n\nWhich of these is correct?\n{options}\n\n"
        'Answer in the form "The correct answer is (letter)".'
    )
    letter = row["answer"].strip()
    answer = f"The correct answer is ({letter})"
    text = f"Read this text, and answer a question about it.\n\n{row['context'].strip()}"
    return Example(text, question, answer, [letter], "chosen_letter", 128)
