"""
RULER (arXiv 2404.06654), as its own scripts write it: github.com/NVIDIA/RULER, `scripts/data/prepare.py`.

Each line of a `validation.jsonl` has the columns `input` (the whole prompt), `outputs` (list of right answers) and, in later versions,
`answer_prefix` (the beginning of the answer; before, `input` ends with it). The last line of the prompt is the question. Make the
files with the template `base`: the tokens of the chat templates of other models would be text to this one. Sets on the hub with
these columns, such as rbiswasfc/ruler, have a configuration for each task and length, and the split `validation`.

Answers are generated with as many tokens as `scripts/data/synthetic/constants.py` says, and scored by the share of right answers that
are in them, or, of the question answering tasks, by whether one is.
"""

from typing import Any

from pyramid_cache.lab.evaluation.public.example import Example


COLUMNS = ("input", "outputs")
SPLIT = "validation"
# What is in the question of a task, and how long its answers may be.
TASKS = {
    "special magic": ("all_found", 128),
    "variables that are assigned": ("all_found", 30),
    "most common words": ("all_found", 120),
    "most frequently appeared": ("all_found", 50),
    "Answer the question based on the given documents": ("any_found", 32),
}
ANSWER = " Answer:"


def read(row: dict[str, Any], name: str) -> Example:
    """The example of a row."""
    prompt = row["input"].rstrip()
    context, found, question = prompt.rpartition("\n")
    # Of question answering the instruction is a line of its own, before the last one.
    known = [mark for mark in TASKS if mark in (context[-500:] if mark.startswith("Answer") else question)]
    if not found or not known:
        raise ValueError(
            f"its last line, {question[-80:]!r}, is not the question of a task of RULER. Prompts have to be made with the template "
            "'base'"
        )
    metric, max_new_tokens = TASKS[known[0]]
    beginning = row.get("answer_prefix") or ""
    if not beginning:
        question, beginning = split_beginning(question)
    references = [str(output) for output in row["outputs"]]
    return Example(
        context, question.strip(), ", ".join(references), references, metric, max_new_tokens, beginning.strip()
    )


def split_beginning(question: str) -> tuple[str, str]:
    """A question, and the beginning of the answer that follows its question mark or its full stop."""
    for mark in (ANSWER, "? ", ". "):
        place = question.find(mark)
        if place >= 0:
            stop = place + (0 if mark == ANSWER else 1)
            return question[:stop], question[stop:]
    return question, ""
