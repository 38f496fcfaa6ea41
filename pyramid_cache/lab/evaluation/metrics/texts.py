"""
What scores generated answers to the questions of RULER, LongBench, LongBench-v2 and GSM8K, after the published definitions:

- RULER: `scripts/eval/synthetic/constants.py` of github.com/NVIDIA/RULER;
- LongBench: `metrics.py` and `eval.py` of github.com/THUDM/LongBench, where the best of several right answers counts;
- LongBench-v2: `extract_answer` in `pred.py` of the same repository;
- GSM8K: `grade_school_math/dataset.py` of github.com/openai/grade-school-math.
"""

import difflib
import re
import string
from collections import Counter
from collections.abc import Sequence

from pyramid_cache.lab.evaluation.extras import import_package


def all_found(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """The share of the right answers that the text has in it, in any order and case (RULER's string_match_all)."""
    return sum(reference.lower() in prediction.lower() for reference in references) / len(references)


def any_found(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Whether the text has one of the right answers in it, in any case (RULER's string_match_part)."""
    return float(any(reference.lower() in prediction.lower() for reference in references))


def word_f1(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """The F1 of the words, without articles, punctuation and case, with the best of the right answers (LongBench)."""
    return max(f1(normalized_words(prediction), normalized_words(reference)) for reference in references)


def normalized_words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation and articles."""
    letters = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", letters).split()


def f1(predicted: Sequence[str], right: Sequence[str]) -> float:
    """The harmonic mean of the shares of each that the other has, each item as often as it comes."""
    num_common = sum((Counter(predicted) & Counter(right)).values())
    # 2 P R / (P + R) with P = common / predicted and R = common / right.
    return 2 * num_common / (len(predicted) + len(right)) if num_common else 0.0


def rouge_l(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """The F-score of ROUGE-L by the package `rouge`, with the best of the right answers (LongBench); 0 for an empty text."""
    rouge = import_package("rouge").Rouge(metrics=["rouge-l"])
    if not any(part.strip() for part in prediction.split(".")):  # which the package refuses
        return 0.0
    return max(rouge.get_scores(prediction, reference)[0]["rouge-l"]["f"] for reference in references)


def word_f1_of_first_line(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """`word_f1` of the first line: behind examples a model goes on with more of them (LongBench)."""
    return word_f1(first_line(prediction), references)


def rouge_l_of_first_line(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """`rouge_l` of the first line (LongBench)."""
    return rouge_l(first_line(prediction), references)


def first_line(text: str) -> str:
    """The first line that is not empty."""
    return text.lstrip("\n").split("\n")[0]


def classification(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """
    One over the number of classes that the first line names, if the right one is among them (LongBench). A class whose name is a
    part of the right one's does not count as named.
    """
    line, best = first_line(prediction), 0.0
    for reference in references:
        named = [choice for choice in choices if choice in line]
        named = [choice for choice in named if choice == reference or choice not in reference]
        best = max(best, 1 / len(named) if reference in named else 0.0)
    return best


def right_numbers(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """The share of the text's numbers that are the number in the right answer (LongBench's counting and retrieval)."""
    numbers = re.findall(r"\d+", prediction)
    wanted = [re.search(r"\d+", reference)[0] for reference in references]
    return max(numbers.count(number) / len(numbers) for number in wanted) if numbers else 0.0


def code_similarity(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """How alike the first line of code of the text, which is neither comment nor fence, and the right one are (LongBench)."""
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    ratios = [difflib.SequenceMatcher(None, code, reference).ratio() for reference in references]
    return round(100 * max(ratios)) / 100


def chosen_letter(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Whether the text says "The correct answer is" and the right letter, in parentheses or without (LongBench-v2)."""
    text = prediction.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(r"The correct answer is ([A-D])", text)
    return float(found is not None and found[1] in references)


def final_number(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Whether the number behind the first "#### " of the text is the right one, without commas (GSM8K)."""
    found = number_behind_marks(prediction)
    return float(found is not None and found in references)


def number_behind_marks(text: str) -> str | None:
    """The number behind "#### ", without commas; None if there is none."""
    found = re.search(r"#### (-?[0-9.,]+)", text)
    return found[1].replace(",", "") if found else None
