"""How right an answer is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Score:
    """
    How right an answer is.

    Attributes:
        token_accuracy (`float`): The share of its tokens that the model finds most likely, each behind the right ones. Of an
            answer of several values: the share of the values all of whose tokens are found.
        log_likelihood (`float`): The mean of the log-probabilities of its tokens, or of those of its values.
    """

    token_accuracy: float
    log_likelihood: float

    @property
    def is_exact(self) -> bool:
        """Whether all of it is what the model finds most likely."""
        return self.token_accuracy == 1


def score_answers(
    logits: torch.Tensor, answers: torch.Tensor, values: Sequence[Sequence[Sequence[int]]] | None = None
) -> list[Score]:
    """
    Compares what a model predicts with right answers.

    Args:
        logits (`torch.Tensor`): `(rows, tokens, vocabulary)`, each for the token of the answer at its place.
        answers (`torch.Tensor`): `(rows, tokens)` token ids.
        values (`Sequence`, *optional*): For each row, where its values begin and end; empty for a row that is one value.
    """
    is_right = logits.argmax(dim=-1) == answers
    chosen = logits.float().log_softmax(dim=-1).gather(-1, answers[..., None]).squeeze(-1)
    scores = []
    for row in range(len(answers)):
        spans = values[row] if values is not None else ()
        if not spans:
            scores.append(Score(is_right[row].float().mean().item(), chosen[row].mean().item()))
            continue
        found = [is_right[row, start:stop].all().item() for start, stop in spans]
        likely = torch.cat([chosen[row, start:stop] for start, stop in spans])
        scores.append(Score(sum(found) / len(found), likely.mean().item()))
    return scores
