"""Questions put to a cache that has read their context."""

import copy
from collections.abc import Iterator, Sequence

import torch
from transformers import Cache, PreTrainedModel

from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.evaluation.scores import Score, score_answers
from pyramid_cache.evaluation.tasks.cases import Question


# Questions on copies of a cache are asked side by side, as far as copies of so many tokens are.
MAX_COPIED_TOKENS = 16384


class Asker:
    """
    Asks, and scores right answers in one forward pass each.

    Args:
        model (`PreTrainedModel`): Reads questions and answers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @torch.no_grad()
    def ask_each(self, cache: Cache, questions: Sequence[Question], by_step: bool = False) -> list[Score]:
        """
        Scores of answers to questions that are asked on copies of a cache.

        Args:
            cache (`Cache`): Has read the context.
            questions (`Sequence[Question]`): Each behind the context alone.
            by_step (`bool`): Whether answers are read token by token.
        """
        scores: dict[int, Score] = {}
        largest = max(MAX_COPIED_TOKENS // max(cache.get_seq_length(), 1), 1)
        for group in groups_of_equal_length(questions, largest):
            asked = copy.deepcopy(cache)
            if len(group) > 1:
                asked.batch_repeat_interleave(len(group))
            chosen = [questions[index] for index in group]
            rows = [question.ids + question.answer[:-1] for question in chosen]
            logits = self._read(asked, rows, len(chosen[0].answer), by_step)
            scores |= zip(group, self._score(logits, chosen), strict=True)
        return [scores[index] for index in range(len(questions))]

    @torch.no_grad()
    def ask_in_turn(
        self,
        cache: Cache,
        questions: Sequence[Question],
        by_step: bool = False,
        first_logits: torch.Tensor | None = None,
    ) -> list[Score]:
        """
        Scores of answers to questions each of which follows the one before and its right answer. The cache goes along.

        Args:
            cache (`Cache`): Has read the context, and the first question as well if there are `first_logits`.
            questions (`Sequence[Question]`): The turns.
            by_step (`bool`): Whether answers are read token by token.
            first_logits (`torch.Tensor`, *optional*): `(1, vocabulary)`, behind the first question.
        """
        scores = []
        carried: list[int] = []
        for question in questions:
            num_logits = len(question.answer)
            if first_logits is None:
                logits = self._read(cache, [carried + question.ids + question.answer[:-1]], num_logits, by_step)
            else:
                logits = first_logits[:, None]
                if num_logits > 1:
                    rest = self._read(cache, [question.answer[:-1]], num_logits - 1, by_step)
                    logits = torch.cat([logits, rest], dim=1)
            scores += self._score(logits, [question])
            # The last token of an answer is read with the next question: nothing of its own is said behind it.
            carried, first_logits = question.answer[-1:], None
        return scores

    def _read(self, cache: Cache, rows: Sequence[list[int]], num_logits: int, by_step: bool) -> torch.Tensor:
        """The last `num_logits` logits `(rows, num_logits, vocabulary)` of rows of as many tokens each."""
        ids = self._batch(rows)
        pieces = [ids]
        if by_step:
            num_first = ids.shape[1] - num_logits + 1
            pieces = [piece for piece in (ids[:, :num_first], *ids[:, num_first:].split(1, dim=1)) if piece.shape[1]]
        logits = [
            self.model(piece, **{CACHE_ARGUMENT: cache}, logits_to_keep=min(num_logits, piece.shape[1])).logits
            for piece in pieces
        ]
        return torch.cat(logits, dim=1)[:, -num_logits:]

    def _score(self, logits: torch.Tensor, questions: Sequence[Question]) -> list[Score]:
        answers = self._batch([question.answer for question in questions])
        return score_answers(logits, answers, [question.values for question in questions])

    def _batch(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(rows, device=self.model.device)


def groups_of_equal_length(questions: Sequence[Question], largest: int) -> Iterator[list[int]]:
    """The indices of questions in groups of at most `largest`, whose questions and answers have the same lengths."""
    by_length: dict[tuple[int, int], list[int]] = {}
    for index, question in enumerate(questions):
        by_length.setdefault((len(question.ids), len(question.answer)), []).append(index)
    for indices in by_length.values():
        yield from (indices[start : start + largest] for start in range(0, len(indices), largest))
