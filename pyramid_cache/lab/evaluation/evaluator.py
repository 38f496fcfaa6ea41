"""
Answers to the questions of contexts, from each cache and from the full one.

The right answer is scored in one forward pass over its tokens. If the model finds each of them most likely, greedy
decoding says the same, as long as the cache evicts nothing more: what question and answer drive out is not measured.
In a conversation the right answers are read, and each later turn makes a cache evict as usual.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.engine.replay import ReplayingCache
from pyramid_cache.lab.evaluation.asking import Score, Thread, ask
from pyramid_cache.lab.evaluation.cells import ALL_QUESTIONS, Cell, CellKey, CellStore
from pyramid_cache.lab.evaluation.reading import Reader, Reading, filled, pad_left, padding_arguments, replay
from pyramid_cache.lab.evaluation.tasks import Context, Question
from pyramid_cache.lab.registry import BASELINE, TRANSFORMERS, CacheEntry, Workload
from pyramid_cache.lab.timed_generation import held_bytes
from pyramid_cache.lab.weights import ProgressCallback


# "context": the context is read and compressed, then come question and answer, each question on a copy of the cache.
# "question": context and question are read together and compressed, then comes the answer.
PROTOCOLS = ("context", "question")

# The name of a cache and its budget.
Setting = tuple[str, float]
FULL: Setting = (BASELINE, 1.0)
# Contexts of one task, each with its rank.
Batch = list[tuple[int, Context]]


@dataclass
class Result:
    """What one cache, or `BASELINE` with a budget of 1.0, made of the cases of a task."""

    task: str
    protocol: str
    cache: str
    budget: float
    num_turns: int = 1  # how many scores one after the other are of one conversation
    cells: list[Cell] = field(default_factory=list)  # in the order of contexts and their questions

    @property
    def scores(self) -> list[Score]:
        """One per case."""
        return [score for cell in self.cells for score in cell.scores]

    @property
    def held_shares(self) -> list[float]:
        """One per compression: the bytes that the cache held as a share of the full one's."""
        return [cell.held_share for cell in self.cells]


@dataclass
class Evaluation:
    """Results of some caches on the contexts of a model."""

    model: PreTrainedModel
    caches: Mapping[str, CacheEntry]  # by name
    # Fractions of the prompt, or whole numbers of tokens; each cache that has a budget gets each of them.
    budgets: Sequence[float]
    protocols: Sequence[str] = PROTOCOLS
    store: CellStore = field(default_factory=CellStore)  # what it holds already is not measured again
    batch_size: int = 1  # how many contexts of a task are read at a time, padded on the left
    has_tokenizer: bool = True  # of the model

    def run(self, contexts: Sequence[Context], progress: ProgressCallback) -> list[Result]:
        """Asks all questions. There is a result per task, protocol, cache and budget, the full cache first."""
        self.measure(contexts, progress)
        return self.results(contexts)

    def measure(
        self, contexts: Sequence[Context], progress: ProgressCallback, process: int = 0, num_processes: int = 1
    ) -> None:
        """Asks the questions of each `num_processes`-th context from the `process`-th on that are not in the store."""
        own = list(enumerate_by_task(contexts))[process::num_processes]
        total = len(self.protocols) * sum(len(context.questions) for _, context in own)
        num_done = 0
        for batch in batches_of(own, self.batch_size):
            alone = [name for name in self.caches if len(batch) > 1 and not self.caches[name].takes_batches]
            for num_answered in self._ask(batch, [name for name in self.caches if name not in alone]):
                num_done += num_answered
                progress(batch[0][1].task, num_done, total)
            for place in batch if alone else ():
                for _ in self._ask([place], alone):
                    pass

    def settings(self, names: Iterable[str]) -> list[Setting]:
        """Some of the caches with each of their budgets, which is 1.0 for those that have none."""
        budgets = {name: self.budgets if self.caches[name].has_budget else (1.0,) for name in names}
        return [(name, budget) for name in budgets for budget in budgets[name]]

    def results(self, contexts: Sequence[Context]) -> list[Result]:
        """What the store holds of these contexts, in an order that does not depend on who asked them when."""
        known = {(context.task, index) for index, context in enumerate_by_task(contexts)}
        settings = [FULL, *self.settings(self.caches)]
        num_turns = {task.task: len(task.questions) if task.is_conversation else 1 for task in contexts}
        results = {
            (task, protocol, *setting): Result(task, protocol, *setting, num_turns[task])
            for task, protocol, setting in itertools.product(num_turns, self.protocols, settings)
        }
        for key, cell in sorted(self.store.cells.items()):
            result = results.get((key.task, key.protocol, key.cache, key.budget))
            if result is not None and (key.task, key.context) in known:
                result.cells.append(cell)
        return [result for result in results.values() if result.cells]

    def _ask(self, batch: Batch, names: Sequence[str]) -> Iterator[int]:
        """Asks some caches, and the full one, the questions of some contexts; yields how many are done."""
        contexts = [context for _, context in batch]
        num_questions = sum(len(context.questions) for context in contexts)
        prompts = [context.ids for context in contexts]
        threads = [(row, thread) for row, context in enumerate(contexts) for thread in context.threads]
        settings = [FULL, *self.settings(names)]
        # Where all is known already, there is nothing to read.
        find_reader = functools.cache(lambda: Reader(self.model, *pad_left(prompts, self.model.device)))
        if "context" in self.protocols:
            self._answer(batch, prompts, threads, lambda: find_reader().context, "context", ALL_QUESTIONS, settings)
            yield num_questions
        if "question" in self.protocols:
            for number in range(max(len(context.threads) for context in contexts)):
                chosen = [place for place in batch if number in place[1].in_view]
                if chosen:
                    self._ask_in_view(chosen, number, settings, find_reader if len(chosen) == len(batch) else None)
                    num_questions -= len(chosen)
                    yield len(chosen)
            # Those of one token, and later turns.
            yield num_questions

    def _ask_in_view(
        self, batch: Batch, number: int, settings: Sequence[Setting], find_reader: Callable[[], Reader] | None
    ) -> None:
        """Asks a question that is read with its context, and later turns. A given reader has read the contexts."""
        turns = [context.threads[number] for _, context in batch]
        firsts = [first.ids for first, *_ in turns]
        prompts = [context.ids + first for (_, context), first in zip(batch, firsts, strict=True)]
        threads = [(row, [replace(first, ids=[]), *later]) for row, (first, *later) in enumerate(turns)]

        def find_reading() -> Reading:
            if find_reader is not None and len(set(map(len, firsts))) == 1:
                return find_reader().with_question(torch.tensor(firsts, device=self.model.device))
            return Reader(self.model, *pad_left(prompts, self.model.device)).context

        question = ALL_QUESTIONS if batch[0][1].is_conversation else number
        self._answer(batch, prompts, threads, find_reading, "question", question, settings)

    def _answer(
        self,
        batch: Batch,
        prompts: Sequence[list[int]],
        threads: Sequence[Thread],
        find_reading: Callable[[], Reading],
        protocol: str,
        question: int,
        settings: Sequence[Setting],
    ) -> None:
        """
        Measures what is not in the store: each cache at its budget reads the prompts and is asked the threads behind
        them. In the protocol "question", the first question of each thread is part of its prompt.
        """
        missing: dict[Setting, list[tuple[int, CellKey]]] = {}
        for setting, (row, (index, context)) in itertools.product(settings, enumerate(batch)):
            key = CellKey(context.task, index, question, protocol, *setting)
            if key not in self.store.cells and key.question_numbers(context):
                missing.setdefault(setting, []).append((row, key))
        if not missing:
            return
        reading = find_reading()
        for setting, places in missing.items():
            cache, logits = self.read(setting, prompts, reading)
            held_share = 1.0 if setting == FULL else reading.share_of(held_bytes(cache))
            entry = TRANSFORMERS[BASELINE] if setting == FULL else self.caches[setting[0]]
            first_logits = logits if protocol == "question" else None
            ways = {"by_step": entry.reads_answers_by_step, "copies_rows": entry.copies_rows}
            found = ask(self.model, cache, threads, first_logits, reading.padding, **ways)
            by_row: dict[int, list[Score]] = {}
            for (row, _), scores in zip(threads, found, strict=True):
                by_row.setdefault(row, []).extend(scores)
            for row, key in places:
                scores = by_row[row]
                if key.question == ALL_QUESTIONS:
                    scores = [scores[number] for number in key.question_numbers(batch[row][1])]
                accuracies = [score.token_accuracy for score in scores]
                self.store.add(Cell(key, accuracies, [score.log_likelihood for score in scores], held_share))

    @torch.no_grad()
    def read(self, setting: Setting, prompts: Sequence[list[int]], reading: Reading) -> tuple[Any, torch.Tensor]:
        """
        A new cache that has read prompts in its own way, and the logits `(rows, vocabulary)` of the last token of
        each. The reading is of the same prompts with full attention.
        """
        if setting == FULL:
            return filled(DynamicCache(config=self.model.config), reading), reading.logits
        name, budget = setting
        entry = self.caches[name]
        workload = Workload(reading.num_tokens, len(prompts), has_tokenizer=self.has_tokenizer)
        cache: Any = entry.build(self.model, budget, workload)
        if not issubclass(entry.cache_class, CompressedCache):
            return filled(cache, reading), reading.logits
        ids, padding = pad_left(prompts, self.model.device)
        replays_once = isinstance(cache, ReplayingCache) and padding is None
        if not entry.from_model or replays_once:
            replay(cache, reading)
            if replays_once and cache.replays:
                if name not in reading.replays:
                    cache.begin(ids, [0] * len(ids))
                    reading.replays[name] = cache.read_again()
                cache.settle_with(*reading.replays[name])
            return cache, reading.logits
        arguments = padding_arguments(padding, 0, ids.shape[1])
        return cache, self.model(ids, **{CACHE_ARGUMENT: cache}, logits_to_keep=1, **arguments).logits[:, -1]


def enumerate_by_task(contexts: Sequence[Context]) -> Iterator[tuple[int, Context]]:
    """Each context with its rank among those of its task."""
    counters: dict[str, Iterator[int]] = {}
    for context in contexts:
        yield next(counters.setdefault(context.task, itertools.count())), context


def batches_of(contexts: Sequence[tuple[int, Context]], batch_size: int) -> Iterator[Batch]:
    """Contexts that come one behind the other in batches, each of one task."""
    for _, group in itertools.groupby(contexts, key=lambda place: (place[1].task, place[1].is_conversation)):
        places = list(group)
        yield from (places[start : start + batch_size] for start in range(0, len(places), batch_size))


def len_behind(threads: Sequence[Sequence[Question]]) -> int:
    """How many tokens a model reads behind a prompt at most to be asked and scored on all of an answer."""
    return max(sum(len(question.ids) + len(question.answer) for question in thread) for thread in threads) - 1
