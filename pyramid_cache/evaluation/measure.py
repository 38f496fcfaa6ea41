"""
Answers to the questions of contexts, from each cache and from the full one.

An answer is scored in one forward pass over its right tokens. If each of them is what the model finds most likely, then it is
what greedy decoding says as long as the cache evicts nothing more: what question and answer themselves drive out is not
measured.
"""

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.evaluation.caches import BASELINE, EvaluatedCache
from pyramid_cache.evaluation.reading import Reader, Reading, full_cache
from pyramid_cache.evaluation.tasks import Context, Question
from pyramid_cache.weights import ProgressCallback


# "context": the context is read and compressed, then come question and answer, each question on a copy of the cache.
# "question": context and question are read together and compressed, then comes the answer.
PROTOCOLS = ("context", "question")
# Questions on copies of a cache are asked side by side, as far as copies of so many tokens are.
MAX_COPIED_TOKENS = 16384


@dataclass(frozen=True)
class Score:
    """
    How right an answer is.

    Attributes:
        token_accuracy (`float`): The share of its tokens that the model finds most likely, each behind the right ones.
        log_likelihood (`float`): The mean of their log-probabilities.
    """

    token_accuracy: float
    log_likelihood: float

    @property
    def is_exact(self) -> bool:
        """Whether all of it is what the model finds most likely."""
        return self.token_accuracy == 1


@dataclass
class Result:
    """
    What one cache made of the cases of a task.

    Attributes:
        cache (`str`): Its name in `CACHES`, or `BASELINE`.
        budget (`float`): 1.0 for the full cache.
        scores (`list[Score]`): One per case, in the order of contexts and their questions.
        held_shares (`list[float]`): One per compression: the bytes that the cache held of those of the full one.
    """

    task: str
    protocol: str
    cache: str
    budget: float
    scores: list[Score] = field(default_factory=list)
    held_shares: list[float] = field(default_factory=list)


class Evaluation:
    """
    Results of some caches on the contexts of a model.

    Args:
        model (`PreTrainedModel`): Reads contexts and answers.
        caches (`dict[str, EvaluatedCache]`): By name.
        budgets (`Sequence[float]`): Fractions of the prompt; each cache gets each of them.
        protocols (`Sequence[str]`): Of `PROTOCOLS`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        caches: dict[str, EvaluatedCache],
        budgets: Sequence[float],
        protocols: Sequence[str] = PROTOCOLS,
    ) -> None:
        self.model = model
        self.caches = caches
        self.budgets = budgets
        self.protocols = protocols
        self.results: dict[tuple[str, str, str, float], Result] = {}

    def run(self, contexts: Sequence[Context], progress: ProgressCallback) -> list[Result]:
        """
        Asks all questions.

        Args:
            contexts (`Sequence[Context]`): Of one task or of several.
            progress (`Callable`): Told of every question and protocol.

        Returns:
            `list[Result]`: One per task, protocol, cache and budget, the full cache first.
        """
        total = len(self.protocols) * sum(len(context.questions) for context in contexts)
        counter = itertools.count(1)
        for context in contexts:
            for num_questions in self._ask(context):
                for _ in range(num_questions):
                    progress(context.task, next(counter), total)
        return list(self.results.values())

    def _ask(self, context: Context) -> Iterator[int]:
        """Asks the questions of one context; yields how many are done."""
        reader = Reader(self.model, self._batch([context.ids]))
        if "context" in self.protocols:
            self._ask_after_context(context, reader.context)
            yield len(context.questions)
        # Answers of one token follow from a full reading of the prompt: there is nothing to ask a cache.
        in_view = [question for question in context.questions if len(question.answer) > 1]
        if "question" in self.protocols:
            for question in in_view:
                self._ask_in_view(context, question, reader)
                yield 1
            yield len(context.questions) - len(in_view)
        self._ask_streams(context, in_view, reader.context)

    def _ask_after_context(self, context: Context, reading: Reading) -> None:
        full = full_cache(self.model, reading)
        self._note(context, "context", BASELINE, 1.0, self._answer_all(full, context.questions))
        for name, budget in self._settings_of("dense", "own"):
            if self.caches[name].reading == "dense":
                cache = self._fill(name, budget, reading)
            else:
                cache, _ = self._read(name, budget, context.ids)
            result = self._note(context, "context", name, budget, self._answer_all(cache, context.questions))
            result.held_shares.append(cache.nbytes / num_bytes(full))

    def _ask_in_view(self, context: Context, question: Question, reader: Reader) -> None:
        reading = reader.with_question(self._batch([question.ids]))
        full = full_cache(self.model, reading)
        full_bytes = num_bytes(full)
        score = self._finish(full, reading.logits, question)
        self._note(context, "question", BASELINE, 1.0, [score])
        for name, budget in self._settings_of("dense", "own"):
            if self.caches[name].reading == "dense":
                cache, logits = self._fill(name, budget, reading), reading.logits
            else:
                cache, logits = self._read(name, budget, context.ids + question.ids)
            held_share = cache.nbytes / full_bytes
            result = self._note(context, "question", name, budget, [self._finish(cache, logits, question)])
            result.held_shares.append(held_share)

    def _ask_streams(self, context: Context, in_view: Sequence[Question], reading: Reading) -> None:
        """Both protocols at once: they are the same to these caches, but for a budget that counts the question as well."""
        full_bytes = num_bytes(full_cache(self.model, reading))
        for name, budget in self._settings_of("stream"):
            cache, _ = self._read(name, budget, context.ids)
            scores = self._answer_all(cache, context.questions)
            for protocol in self.protocols:
                asked = context.questions if protocol == "context" else in_view
                if asked:
                    pairs = zip(scores, context.questions, strict=True)
                    found = [score for score, question in pairs if protocol == "context" or len(question.answer) > 1]
                    result = self._note(context, protocol, name, budget, found)
                    result.held_shares.append(cache.nbytes / full_bytes)

    def _settings_of(self, *readings: str) -> list[tuple[str, float]]:
        """The caches that read prompts in one of these ways, with each budget."""
        names = [name for name, cache in self.caches.items() if cache.reading in readings]
        return list(itertools.product(names, self.budgets))

    # Reading.

    def _batch(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(rows, device=self.model.device)

    def _fill(self, name: str, budget: float, reading: Reading) -> CompressedCache:
        """A new cache that holds what it keeps of a prompt that was read with full attention."""
        cache = self.caches[name].build(self.model, budget, reading.num_tokens)
        with torch.no_grad():
            cache.replay(reading.layers)
        return cache

    @torch.no_grad()
    def _read(self, name: str, budget: float, ids: list[int]) -> tuple[CompressedCache, torch.Tensor]:
        """A new cache that has read a prompt itself, and the logits `(1, vocabulary)` of its last token."""
        cache = self.caches[name].build(self.model, budget, len(ids))
        return cache, self.model(self._batch([ids]), **{CACHE_ARGUMENT: cache}, logits_to_keep=1).logits[:, -1]

    # Answers.

    @torch.no_grad()
    def _answer_all(self, cache: CompressedCache | DynamicCache, questions: Sequence[Question]) -> list[Score]:
        """Scores the answers to questions that are asked on copies of a cache."""
        scores: dict[int, Score] = {}
        largest = max(MAX_COPIED_TOKENS // max(cache.get_seq_length(), 1), 1)
        for group in groups_of_equal_length(questions, largest):
            asked = copy.deepcopy(cache)
            if len(group) > 1:
                asked.batch_repeat_interleave(len(group))
            rows = self._batch([questions[index].ids + questions[index].answer[:-1] for index in group])
            answers = self._batch([questions[index].answer for index in group])
            logits = self.model(rows, **{CACHE_ARGUMENT: asked}, logits_to_keep=answers.shape[1]).logits
            scores |= zip(group, score_answers(logits, answers), strict=True)
        return [scores[index] for index in range(len(questions))]

    @torch.no_grad()
    def _finish(self, cache: Cache, first_logits: torch.Tensor, question: Question) -> Score:
        """Scores the answer to a question that a cache has read, which ends with `first_logits` `(1, vocabulary)`."""
        answer = self._batch([question.answer])
        logits = self.model(answer[:, :-1], **{CACHE_ARGUMENT: cache}).logits
        return score_answers(torch.cat([first_logits[:, None], logits], dim=1), answer)[0]

    def _note(self, context: Context, protocol: str, cache: str, budget: float, scores: Iterable[Score]) -> Result:
        key = (context.task, protocol, cache, budget)
        result = self.results.setdefault(key, Result(*key))
        result.scores.extend(scores)
        return result


def score_answers(logits: torch.Tensor, answers: torch.Tensor) -> list[Score]:
    """
    Compares what a model predicts with right answers.

    Args:
        logits (`torch.Tensor`): `(rows, tokens, vocabulary)`, each for the token of the answer at its place.
        answers (`torch.Tensor`): `(rows, tokens)` token ids.
    """
    is_right = logits.argmax(dim=-1) == answers
    chosen = logits.float().log_softmax(dim=-1).gather(-1, answers[..., None]).squeeze(-1)
    rows = zip(is_right.float().mean(dim=-1).tolist(), chosen.mean(dim=-1).tolist(), strict=True)
    return [Score(token_accuracy, log_likelihood) for token_accuracy, log_likelihood in rows]


def groups_of_equal_length(questions: Sequence[Question], largest: int) -> Iterator[list[int]]:
    """The indices of questions in groups of at most `largest`, whose questions and answers have the same lengths."""
    by_length: dict[tuple[int, int], list[int]] = {}
    for index, question in enumerate(questions):
        by_length.setdefault((len(question.ids), len(question.answer)), []).append(index)
    for indices in by_length.values():
        yield from (indices[start : start + largest] for start in range(0, len(indices), largest))


def num_bytes(cache: DynamicCache) -> int:
    """What the keys and values of a full cache take."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
