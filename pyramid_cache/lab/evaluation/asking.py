"""Questions put to a cache that has read their context."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import Cache, PreTrainedModel

from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.lab.evaluation.metrics import METRICS
from pyramid_cache.lab.evaluation.padding import padding_arguments
from pyramid_cache.lab.evaluation.scores import Score, score_answers
from pyramid_cache.lab.evaluation.tasks.cases import Question


# Questions on copies of a cache are asked side by side, as far as copies of so many tokens are.
MAX_COPIED_TOKENS = 16384


@dataclass(frozen=True)
class Writing:
    """
    How generated tokens become text.

    Attributes:
        decode (`Callable`): Gives the text of token ids.
        end_token_ids (`set[int]`): Each ends an answer.
    """

    decode: Callable[[list[int]], str]
    end_token_ids: set[int] = field(default_factory=set)


class Asker:
    """
    Asks, and scores answers: right ones are read in one forward pass each; where a question has a metric, an answer is generated
    greedily, and the metric takes the place of the token accuracy.

    Args:
        model (`PreTrainedModel`): Reads questions and answers.
        writing (`Writing`, *optional*): Needed for questions with a metric.
    """

    def __init__(self, model: PreTrainedModel, writing: Writing | None = None) -> None:
        self.model = model
        self.writing = writing

    @torch.no_grad()
    def ask_each(
        self,
        cache: Cache,
        questions: Sequence[Question],
        by_step: bool = False,
        rows: Sequence[int] | None = None,
        padding: torch.Tensor | None = None,
    ) -> list[Score]:
        """
        Scores of answers to questions that are asked on copies of a cache.

        Args:
            cache (`Cache`): Has read the contexts.
            questions (`Sequence[Question]`): Each behind its context alone.
            by_step (`bool`): Whether answers are read token by token.
            rows (`Sequence[int]`, *optional*): Which row of the cache has the context of each question. Without it, there is one.
            padding (`torch.Tensor`, *optional*): `(batch,)`, how many columns of padding each row begins with.
        """
        scores: dict[int, Score] = {}
        largest = max(MAX_COPIED_TOKENS // max(cache.get_seq_length(), 1), 1)
        for group in groups_of_equal_length(questions, largest):
            asked = copy.deepcopy(cache)
            if rows is not None:
                chosen = torch.tensor([rows[index] for index in group], device=self.model.device)
                asked.batch_select_indices(chosen)
            elif len(group) > 1:
                asked.batch_repeat_interleave(len(group))
            found = self._ask(
                asked,
                [questions[index] for index in group],
                by_step,
                padding=None if padding is None else padding[chosen],
            )
            scores |= zip(group, found, strict=True)
        return [scores[index] for index in range(len(questions))]

    @torch.no_grad()
    def ask_in_turn(
        self,
        cache: Cache,
        questions: Sequence[Question],
        by_step: bool = False,
        first_logits: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
    ) -> list[Score]:
        """
        Scores of answers to questions each of which follows the one before and its right answer. The cache goes along.

        Args:
            cache (`Cache`): Has read the context, and the first question as well if there are `first_logits`.
            questions (`Sequence[Question]`): The turns.
            by_step (`bool`): Whether answers are read token by token.
            first_logits (`torch.Tensor`, *optional*): `(1, vocabulary)`, behind the first question.
            padding (`torch.Tensor`, *optional*): `(1,)`, how many columns of padding the context begins with.
        """
        scores = []
        carried: list[int] = []
        for question in questions:
            scores += self._ask(cache, [question], by_step, carried, first_logits, padding)
            # The last token of an answer is read with the next question: nothing of its own is said behind it.
            carried, first_logits = question.answer[-1:], None
        return scores

    @torch.no_grad()
    def ask_rows_in_turn(
        self,
        cache: Cache,
        turns: Sequence[Sequence[Question]],
        by_step: bool = False,
        first_logits: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
    ) -> list[list[Score]]:
        """
        What `ask_in_turn` gives for each row of a cache, which stays as it is; first questions alone are asked side by side.

        Args:
            cache (`Cache`): Has read the contexts, and the first questions as well if there are `first_logits`.
            turns (`Sequence[Sequence[Question]]`): Of each row.
            by_step, padding: As for `ask_each`.
            first_logits (`torch.Tensor`, *optional*): `(batch, vocabulary)`, behind the first question of each row.
        """
        if any(len(questions) > 1 for questions in turns):
            groups = [[row] for row in range(len(turns))]
        else:
            # First questions that have been read may be of any length.
            firsts = [questions[0] if first_logits is None else replace(questions[0], ids=[]) for questions in turns]
            groups = list(groups_of_equal_length(firsts, len(firsts)))
        scores: dict[int, list[Score]] = {}
        for group in groups:
            rows = torch.tensor(group, device=self.model.device)
            asked = copy.deepcopy(cache)
            if len(turns) > 1:
                asked.batch_select_indices(rows)
            logits = None if first_logits is None else first_logits[rows]
            own = None if padding is None else padding[rows]
            if len(group) > 1:
                found = self._ask(asked, [turns[row][0] for row in group], by_step, (), logits, own)
                scores |= {row: [score] for row, score in zip(group, found, strict=True)}
            else:
                scores[group[0]] = self.ask_in_turn(asked, turns[group[0]], by_step, logits, own)
        return [scores[row] for row in range(len(turns))]

    def _ask(
        self,
        cache: Cache,
        questions: Sequence[Question],
        by_step: bool,
        carried: Sequence[int] = (),
        first_logits: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
    ) -> list[Score]:
        """Scores of one question a row, all as long as each other, if they are to be read, and with answers as long."""
        generated = copy.deepcopy(cache) if questions[0].metric else None
        asked = [[*carried, *question.ids] for question in questions]
        answers = [question.answer for question in questions]
        num_logits = len(answers[0])
        if first_logits is None:
            rows = [ids + answer[:-1] for ids, answer in zip(asked, answers, strict=True)]
            logits = self._read(cache, rows, num_logits, by_step, padding)
        else:
            logits = first_logits[:, None]
            if num_logits > 1:
                rest = self._read(cache, [answer[:-1] for answer in answers], num_logits - 1, by_step, padding)
                logits = torch.cat([logits, rest], dim=1)
        scores = score_answers(logits, self._batch(answers), [question.values for question in questions])
        if generated is None:
            return scores
        if first_logits is None:
            first_logits = self._read(generated, asked, 1, by_step, padding)[:, -1]
        texts = self._generate(generated, first_logits, questions[0].max_new_tokens, padding)
        return [
            Score(METRICS[question.metric](text, question.references, question.choices), score.log_likelihood)
            for question, text, score in zip(questions, texts, scores, strict=True)
        ]

    def _generate(
        self, cache: Cache, logits: torch.Tensor, max_new_tokens: int, padding: torch.Tensor | None
    ) -> list[str]:
        """What greedy decoding says, in each row up to a token that ends it, behind the logits `(rows, vocabulary)` of its prompt."""
        if self.writing is None:
            raise ValueError(
                "Answers to these questions are generated: give the evaluation a Writing, which says how tokens become text."
            )
        ends = self.writing.end_token_ids
        rows: list[list[int]] = [[] for _ in logits]
        has_ended = [False] * len(rows)
        for _ in range(max_new_tokens):
            tokens = logits.argmax(dim=-1)
            for index, token in enumerate(tokens.tolist()):
                has_ended[index] = has_ended[index] or token in ends
                if not has_ended[index]:
                    rows[index].append(token)
            if all(has_ended) or len(rows[0]) == max_new_tokens:
                break
            logits = self._forward(cache, tokens[:, None], 1, padding)[:, -1]
        return [self.writing.decode(row) for row in rows]

    def _read(
        self,
        cache: Cache,
        rows: Sequence[list[int]],
        num_logits: int,
        by_step: bool,
        padding: torch.Tensor | None,
    ) -> torch.Tensor:
        """The last `num_logits` logits `(rows, num_logits, vocabulary)` of rows of as many tokens each."""
        ids = self._batch(rows)
        pieces = [ids]
        if by_step:
            num_first = ids.shape[1] - num_logits + 1
            pieces = [piece for piece in (ids[:, :num_first], *ids[:, num_first:].split(1, dim=1)) if piece.shape[1]]
        logits = [self._forward(cache, piece, min(num_logits, piece.shape[1]), padding) for piece in pieces]
        return torch.cat(logits, dim=1)[:, -num_logits:]

    def _forward(self, cache: Cache, ids: torch.Tensor, num_logits: int, padding: torch.Tensor | None) -> torch.Tensor:
        arguments = padding_arguments(padding, cache.get_seq_length(), ids.shape[1])
        return self.model(ids, **{CACHE_ARGUMENT: cache}, logits_to_keep=num_logits, **arguments).logits

    def _batch(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(rows, device=self.model.device)


def groups_of_equal_length(questions: Sequence[Question], largest: int) -> Iterator[list[int]]:
    """The indices of questions in groups of at most `largest`, which can be asked and answered side by side."""
    by_length: dict[tuple[int, int, str, int], list[int]] = {}
    for index, question in enumerate(questions):
        kind = (len(question.ids), len(question.answer), question.metric, question.max_new_tokens)
        by_length.setdefault(kind, []).append(index)
    for indices in by_length.values():
        yield from (indices[start : start + largest] for start in range(0, len(indices), largest))
