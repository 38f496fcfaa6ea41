"""
InfiniteBench (arXiv 2402.13718): the hub's xinrongzhang2022/InfiniteBench, with a split for each set, or its file of one set.

Columns, after the repository github.com/OpenBMB/InfiniteBench: `context`, `input` (the question), `answer` (list of right answers) and
`options` (list, of multiple choice). Which set it is says the name behind the source, or else the name of the file, such as
`kv_retrieval.jsonl`. Metrics are those of its `src/compute_scores.py`, lengths of answers those of `src/eval_utils.py`, but for one:
`math_find` has six tokens here, as three are not enough for every tokenizer to say a number. Instructions are in other words.
"""

from typing import Any, NamedTuple

from pyramid_cache.lab.evaluation.public.example import Example


COLUMNS = ("context", "input", "answer", "options")
SPLIT = None  # the name of the set
LETTERS = "ABCD"


class Set(NamedTuple):
    """How the questions of one set are asked."""

    metric: str
    max_new_tokens: int
    before: str
    behind: str = "{input}"
    beginning: str = ""


LETTER = "{input}\n{options}\n\nAnswer with the letter of the right option alone."
SETS = {
    "passkey": Set(
        "first_integer", 6, "A pass key is hidden in this text. Memorize it.\n\n", beginning="The pass key is"
    ),
    "number_string": Set(
        "first_integer",
        12,
        "A sequence of digits is hidden in this text. Memorize it.\n\n",
        beginning="The sequence of digits is",
    ),
    "kv_retrieval": Set("word_found", 50, "Find the value of a key in this JSON object.\n\n"),
    "longbook_sum_eng": Set("rouge_lsum", 1200, "Here is a book.\n\n", "Summarize the book."),
    "longbook_choice_eng": Set("letter_of_choice", 40, "Answer a question about this book.\n\n", LETTER),
    "longbook_qa_eng": Set("word_f1", 40, "Answer a question about this book, in a few words.\n\n"),
    "longbook_qa_chn": Set("character_f1", 40, "请阅读这本书，并简短地回答问题。\n\n"),
    "longdialogue_qa_eng": Set(
        "name_found",
        40,
        "In this script, one name of a character is replaced by $$MASK$$.\n\n",
        "Who is $$MASK$$ most likely? Answer with the name alone, as it stands before a colon in the script.",
    ),
    "math_find": Set("first_number", 6, "Find a number in this list.\n\n"),
    "math_calc": Set(
        "leading_numbers",
        30_000,
        "Work out this long expression.\n\n",
        "List the value after each operation, and nothing else.",
    ),
    "code_run": Set(
        "last_integer", 5, "Here are Python functions.\n\n", "{input}\nEnd with the value that is returned."
    ),
    "code_debug": Set(
        "broken_function",
        5,
        "One function of this project has an obvious error.\n\n",
        LETTER,
        "The correct option is:",
    ),
}


def read(row: dict[str, Any], name: str) -> Example:
    """The example of a row of the set of that name."""
    if name not in SETS:
        raise ValueError(
            f"there is no set {name!r}. Sets are {', '.join(SETS)}; name one behind the source, or the file by it"
        )
    found = SETS[name]
    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    references = [str(answer) for answer in answers]
    options = list(row["options"] or [])
    answer = references[0]
    if found.behind == LETTER:
        letter = LETTERS[options.index(references[0])]
        # The letter counts, and so does what it stands for.
        references, answer = [letter, references[0]], letter
    elif found.metric == "leading_numbers":
        answer = str(answers)
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    question = found.behind.replace("{input}", row["input"] or "").replace("{options}", listed)
    return Example(
        found.before + row["context"],
        question.strip(),
        answer,
        references,
        found.metric,
        found.max_new_tokens,
        found.beginning,
    )
