"""What scores generated answers to the questions of InfiniteBench (arXiv 2402.13718; `src/compute_scores.py` of its repository)."""

import re
import string
from collections.abc import Sequence

from pyramid_cache.lab.evaluation.extras import import_package
from pyramid_cache.lab.evaluation.metrics.texts import f1


CHINESE_PUNCTUATION = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏"
LETTERS = "ABCD"


def first_integer(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Whether the first run of digits is the right one (pass key, number string)."""
    found = re.search(r"[0-9]+", prediction)
    return float(found is not None and found[0] in references)


def word_found(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Whether the right answer is a word of the text, between spaces and punctuation (key-value retrieval)."""
    words = re.split(r"[\s:\"'.,?!{}]+", prediction)
    return float(any(reference in words for reference in references))


def name_found(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Whether the right name, in capitals, is a word of the text in any case (dialogue)."""
    return word_found(prediction.upper(), references[:1])


def last_integer(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Whether the last word of the text is the right whole number (code to run)."""
    words = re.split(r"[\s.`'\":]+", prediction.strip(" \n.`'\":"))
    return float(re.fullmatch(r"-?\d+", words[-1]) is not None and str(int(words[-1])) in references)


def first_number(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Whether the first number, whole or not, is the right one (numbers of a list)."""
    found = re.search(r"\d+\.\d+|\d+", prediction)
    return float(found is not None and any(float(found[0]) == float(reference) for reference in references))


def leading_numbers(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """The share of the right numbers, in their order, that come before the first wrong one (calculation)."""
    found = [int(number) for number in re.findall(r"[0-9]+", prediction)]
    num_right = 0
    for number, reference in zip(found, references, strict=False):
        if number != int(reference):
            break
        num_right += 1
    return num_right / len(references)


def letter_of_choice(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """
    Whether the text chooses the right letter or option: its first letter, what follows "answer is" and the like, or else the first
    word that is one of A, B, C and D (book, multiple choice). References are the letter and the option's text.
    """
    if prediction[:1] and prediction[0] in LETTERS:
        return float(prediction[0] in references)
    text = " ".join(re.split(r"[\s\"'.,?!{}]+", prediction))
    for prefix in ("answer is:", "answer:", "answer is", "option is"):
        place = text.find(prefix)
        if place >= 0:
            return float(text[place + len(prefix) + 1 :].startswith(tuple(references)))
    first = next((word for word in text.split() if word in LETTERS), None)
    return float(first is not None and first in references)


def broken_function(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """
    Whether the text begins with the right letter, or names the letter or the function behind "answer is:" and the like (code to
    debug). References are the letter and the function.
    """
    if any(prediction.startswith((f"{letter}.", f"{letter}:")) for letter in references if letter in LETTERS):
        return 1.0
    text = " ".join(re.split(r"(?:[\s`'\"*-]|[Oo]ption)+", prediction.strip()))
    for prefix in ("answer is:", "is:", "answer:"):
        place = text.find(prefix)
        if place >= 0:
            return float(text[place + len(prefix) + 1 :].startswith(tuple(references)))
    return 0.0


def character_f1(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """The F1 of the characters, without punctuation, spaces and case, with the best of the right answers (Chinese book)."""
    return max(f1(characters(prediction), characters(reference)) for reference in references)


def characters(text: str) -> list[str]:
    left_out = string.punctuation + CHINESE_PUNCTUATION + string.whitespace
    return [letter for letter in text.lower() if letter not in left_out]


def rouge_lsum(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """The F-score of ROUGE-Lsum by the package `rouge-score`, with the best of the right answers (summary of a book)."""
    scorer = import_package("rouge_score.rouge_scorer").RougeScorer(["rougeLsum"])
    return max(scorer.score(reference, prediction)["rougeLsum"].fmeasure for reference in references)
