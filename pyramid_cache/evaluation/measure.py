"""
Answers to the questions of contexts, from each cache and from the full one.

An answer is scored in one forward pass over its right tokens; where a question has a metric, one is generated as well. If each of them is what the model finds most likely, then it is
what greedy decoding says as long as the cache evicts nothing more: what question and answer themselves drive out is not
measured. Of a conversation the right answers are read, and each later turn makes a cache evict as it does.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import Cache, PreTrainedModel

from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.evaluation.asking import Asker, Writing
from pyramid_cache.evaluation.caches import BASELINE, EvaluatedCache
from pyramid_cache.evaluation.cells import ALL_QUESTIONS, Cell, CellKey, CellStore
from pyramid_cache.evaluation.reading import Reader, Reading, full_cache
from pyramid_cache.evaluation.scores import Score
from pyramid_cache.evaluation.tasks import Context, Question
from pyramid_cache.weights import ProgressCallback


# "context": the context is read and compressed, then come question and answer, each question on a copy of the cache.
# "question": context and question are read together and compressed, then comes the answer.
PROTOCOLS = ("context", "question")


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
        store (`CellStore`, *optional*): Takes what is measured. What it holds already is not measured again.
        writing (`Writing`, *optional*): Needed where answers are generated.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        caches: dict[str, EvaluatedCache],
        budgets: Sequence[float],
        protocols: Sequence[str] = PROTOCOLS,
        store: CellStore | None = None,
        writing: Writing | None = None,
    ) -> None:
        self.model = model
        self.asker = Asker(model, writing)
        self.caches = caches
        self.budgets = budgets
        self.protocols = protocols
        self.store = CellStore() if store is None else store

    def run(self, contexts: Sequence[Context], progress: ProgressCallback) -> list[Result]:
        """
        Asks all questions.

        Args:
            contexts (`Sequence[Context]`): Of one task or of several.
            progress (`Callable`): Told of every question and protocol.

        Returns:
            `list[Result]`: One per task, protocol, cache and budget, the full cache first.
        """
        self.measure(contexts, progress)
        return self.results(contexts)

    def measure(
        self, contexts: Sequence[Context], progress: ProgressCallback, process: int = 0, num_processes: int = 1
    ) -> None:
        """
        Asks the questions of each `num_processes`-th context from the `process`-th on, as far as the store has no answers.
        """
        own = list(enumerate_by_task(contexts))[process::num_processes]
        total = len(self.protocols) * sum(len(context.questions) for _, context in own)
        counter = itertools.count(1)
        for index, context in own:
            for num_questions in self._ask(index, context):
                for _ in range(num_questions):
                    progress(context.task, next(counter), total)

    def results(self, contexts: Sequence[Context]) -> list[Result]:
        """What the store holds of all questions of these contexts, in an order that does not depend on who asked them when."""
        known = {(context.task, index) for index, context in enumerate_by_task(contexts)}
        settings = [(BASELINE, 1.0), *itertools.product(self.caches, self.budgets)]
        tasks = dict.fromkeys(context.task for context in contexts)
        order = itertools.product(tasks, self.protocols, settings)
        results = {(*place, *setting): Result(*place, *setting) for *place, setting in order}
        for key, cell in sorted(self.store.cells.items()):
            result = results.get((key.task, key.protocol, key.cache, key.budget))
            if result is not None and (key.task, key.context) in known:
                result.scores += itertools.starmap(Score, zip(cell.token_accuracy, cell.log_likelihood, strict=True))
                result.held_shares.append(cell.held_share)
        return [result for result in results.values() if result.scores]

    def _ask(self, index: int, context: Context) -> Iterator[int]:
        """Asks the questions of one context; yields how many are done."""
        # Where all is known already, there is nothing to read.
        find_reader = functools.cache(lambda: Reader(self.model, self._batch([context.ids])))
        if "context" in self.protocols:
            self._ask_after_context(index, context, find_reader)
            yield len(context.questions)
        in_view = [number for number, question in enumerate(context.questions) if is_asked_in_view(question)]
        if context.is_conversation:  # its first question alone is read with the context
            in_view = list(range(len(context.questions)))
        if "question" in self.protocols and context.is_conversation:
            self._ask_in_view(index, context, ALL_QUESTIONS, context.questions, find_reader)
            yield len(context.questions)
        elif "question" in self.protocols:
            for number in in_view:
                self._ask_in_view(index, context, number, [context.questions[number]], find_reader)
                yield 1
            yield len(context.questions) - len(in_view)
        self._ask_streams(index, context, in_view, find_reader)

    def _ask_after_context(self, index: int, context: Context, find_reader: Callable[[], Reader]) -> None:
        missing = self._missing(context.task, index, ALL_QUESTIONS, "context", "dense", "own")
        if not missing:
            return
        reading = find_reader().context
        full = full_cache(self.model, reading)
        num_later = len_behind(context)
        for key in missing:
            if key.cache == BASELINE:
                cache = full
            elif self.caches[key.cache].reading == "dense":
                cache = self._fill(key, reading, num_later)
            else:
                cache, _ = self._read(key, context.ids, num_later)
            self._note(key, self._answer_all(key, cache, context), num_bytes(cache) / num_bytes(full))

    def _ask_in_view(
        self,
        index: int,
        context: Context,
        number: int,
        turns: Sequence[Question],
        find_reader: Callable[[], Reader],
    ) -> None:
        """Asks a question that is read with its context, and the later ones of a conversation behind it."""
        missing = self._missing(context.task, index, number, "question", "dense", "own")
        if not missing:
            return
        first = turns[0].ids
        reading = find_reader().with_question(self._batch([first]))
        num_later = sum(turn.num_tokens for turn in turns) - len(first) - 1
        full_bytes = num_bytes(full_cache(self.model, reading))
        for key in missing:
            logits = reading.logits
            if key.cache == BASELINE:
                cache = full_cache(self.model, reading)
            elif self.caches[key.cache].reading == "dense":
                cache = self._fill(key, reading, num_later)
            else:
                cache, logits = self._read(key, context.ids + first, num_later)
            held_share = num_bytes(cache) / full_bytes
            self._note(key, self.asker.ask_in_turn(cache, turns, self._is_by_step(key), logits), held_share)

    def _ask_streams(
        self, index: int, context: Context, in_view: Sequence[int], find_reader: Callable[[], Reader]
    ) -> None:
        """Both protocols at once: they are the same to these caches, but for a budget that counts the question as well."""
        asked = {"context": list(range(len(context.questions))), "question": in_view}
        by_setting: dict[tuple[str, float], list[CellKey]] = {}
        for protocol in self.protocols:
            for key in self._missing(context.task, index, ALL_QUESTIONS, protocol, "stream"):
                if asked[protocol]:
                    by_setting.setdefault((key.cache, key.budget), []).append(key)
        num_later = len_behind(context)
        for keys in by_setting.values():
            cache, _ = self._read(keys[0], context.ids, num_later)
            held_share = num_bytes(cache) / num_bytes(full_cache(self.model, find_reader().context))
            scores = self._answer_all(keys[0], cache, context)
            for key in keys:
                self._note(key, [scores[number] for number in asked[key.protocol]], held_share)

    def _missing(self, task: str, index: int, question: int, protocol: str, *readings: str) -> list[CellKey]:
        """What has not been measured of the caches that read prompts in one of these ways; of the full one too if "dense"."""
        names = [name for name, cache in self.caches.items() if cache.reading in readings]
        settings = list(itertools.product(names, self.budgets))
        if "dense" in readings:
            settings.insert(0, (BASELINE, 1.0))
        keys = [CellKey(task, index, question, protocol, *setting) for setting in settings]
        return [key for key in keys if key not in self.store]

    # Reading.

    def _batch(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(rows, device=self.model.device)

    def _fill(self, key: CellKey, reading: Reading, num_later: int) -> CompressedCache:
        """A new cache that holds what it keeps of a prompt that was read with full attention."""
        cache = self.caches[key.cache].build(self.model, key.budget, reading.num_tokens, num_later)
        with torch.no_grad():
            cache.replay(reading.layers)
        return cache

    @torch.no_grad()
    def _read(self, key: CellKey, ids: list[int], num_later: int) -> tuple[CompressedCache, torch.Tensor]:
        """A new cache that has read a prompt itself, and the logits `(1, vocabulary)` of its last token."""
        cache = self.caches[key.cache].build(self.model, key.budget, len(ids), num_later)
        return cache, self.model(self._batch([ids]), **{CACHE_ARGUMENT: cache}, logits_to_keep=1).logits[:, -1]

    # Answers.

    def _answer_all(self, key: CellKey, cache: Cache, context: Context) -> list[Score]:
        """Scores of the answers to all questions behind a context that a cache has read."""
        if context.is_conversation:
            return self.asker.ask_in_turn(copy.deepcopy(cache), context.questions, self._is_by_step(key))
        return self.asker.ask_each(cache, context.questions, self._is_by_step(key))

    def _is_by_step(self, key: CellKey) -> bool:
        return key.cache != BASELINE and self.caches[key.cache].reads_answers_by_step

    def _note(self, key: CellKey, scores: Sequence[Score], held_share: float) -> None:
        accuracies, likelihoods = zip(*((score.token_accuracy, score.log_likelihood) for score in scores), strict=True)
        self.store.add(Cell(key, list(accuracies), list(likelihoods), held_share))


def enumerate_by_task(contexts: Sequence[Context]) -> Iterator[tuple[int, Context]]:
    """Each context with its rank among those of its task."""
    counters: dict[str, Iterator[int]] = {}
    for context in contexts:
        yield next(counters.setdefault(context.task, itertools.count())), context


def is_asked_in_view(question: Question) -> bool:
    """
    Whether a cache that has evicted with the question in view has anything to say: the first token of an answer follows from
    a full reading of the prompt.
    """
    return len(question.answer) > 1 or bool(question.metric)


def len_behind(context: Context) -> int:
    """How many tokens a model reads behind a context at most to be asked and scored on all of an answer."""
    lengths = [question.num_tokens for question in context.questions]
    return (sum(lengths) if context.is_conversation else max(lengths)) - 1


def num_bytes(cache: Cache) -> int:
    """What a cache takes: a full one its keys and values."""
    if isinstance(cache, CompressedCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
