"""Metrics of generated answers by name. Each gives a share from 0 to 1 for a text, the right answers and what an answer may be."""

from collections.abc import Callable, Sequence

from pyramid_cache.lab.evaluation.metrics import infinitebench, texts


METRICS: dict[str, Callable[[str, Sequence[str], Sequence[str]], float]] = {
    metric.__name__: metric
    for metric in (
        texts.all_found,
        texts.any_found,
        texts.word_f1,
        texts.rouge_l,
        texts.word_f1_of_first_line,
        texts.rouge_l_of_first_line,
        texts.classification,
        texts.right_numbers,
        texts.code_similarity,
        texts.chosen_letter,
        texts.final_number,
        infinitebench.first_integer,
        infinitebench.word_found,
        infinitebench.name_found,
        infinitebench.last_integer,
        infinitebench.first_number,
        infinitebench.leading_numbers,
        infinitebench.letter_of_choice,
        infinitebench.broken_function,
        infinitebench.character_f1,
        infinitebench.rouge_lsum,
    )
}
