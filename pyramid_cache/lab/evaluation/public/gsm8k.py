"""
GSM8K (arXiv 2110.14168): the hub's openai/gsm8k, configuration `main`, split `test`, or its `test.jsonl`.

Columns: `question`, and `answer`, a solution whose last line is `#### ` and the number. The problem is what is compressed; the model
then works it out in up to 512 tokens, and the number behind `#### ` is compared, as in `grade_school_math/dataset.py` of
github.com/openai/grade-school-math.
"""

import re
from typing import Any

from pyramid_cache.lab.evaluation.metrics.texts import number_behind_marks
from pyramid_cache.lab.evaluation.public.example import Example


COLUMNS = ("question", "answer")
SPLIT = "test"
DEFAULT_NAME = "main"
QUESTION = 'Solve this problem step by step. End with "#### " and the number that is the answer.'


def read(row: dict[str, Any], name: str) -> Example:
    """The example of a row."""
    number = number_behind_marks(row["answer"])
    if number is None:
        raise ValueError("its answer has no number behind '#### '")
    solution = re.sub(r"<<.*?>>", "", row["answer"])  # what a calculator is told
    return Example(row["question"].strip(), QUESTION, solution, [number], "final_number", 512)
