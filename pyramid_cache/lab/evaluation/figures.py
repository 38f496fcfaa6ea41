"""Figures of some tasks beside those that every task has."""

import math
import statistics
from typing import Any

from pyramid_cache.lab.evaluation.evaluator import Result


def figures_of_task(result: Result) -> dict[str, Any]:
    """
    What says more of a task than the means over all cases.

    Returns:
        `dict`: Of `perplexity-L`, "perplexity": the exponential of the negative mean log-likelihood per token. Of conversations,
        "exact_match_by_turn" and "token_accuracy_by_turn": a list with the mean of each turn. Empty for other tasks.
    """
    if result.num_turns > 1:
        turns = [result.scores[turn :: result.num_turns] for turn in range(result.num_turns)]
        return {
            "exact_match_by_turn": [statistics.mean(score.is_exact for score in scores) for scores in turns],
            "token_accuracy_by_turn": [statistics.mean(score.token_accuracy for score in scores) for scores in turns],
        }
    if result.task.startswith("perplexity-"):
        return {"perplexity": math.exp(-statistics.mean(score.log_likelihood for score in result.scores))}
    return {}
