"""
Answers to the questions of contexts, from each cache and from the full one.

An answer is scored in one forward pass over its right tokens; where a question has a metric, one is generated as well. If each
of them is what the model finds most likely, then it is what greedy decoding says as long as the cache evicts nothing more: what
question and answer themselves drive out is not measured. Of a conversation the right answers are read, and each later turn makes
a cache evict as it does.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import Cache, PreTrainedModel

from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.lab.evaluation.asking import Asker, Writing
from pyramid_cache.lab.evaluation.caches import BASELINE, EvaluatedCache
from pyramid_cache.lab.evaluation.cells import ALL_QUESTIONS, Cell, CellKey, CellStore
from pyramid_cache.lab.evaluation.padding import pad_left, padding_arguments
from pyramid_cache.lab.evaluation.reading import Reader, Reading, full_cache
from pyramid_cache.lab.evaluation.scores import Score
from pyramid_cache.lab.evaluation.tasks import Context
from pyramid_cache.lab.weights import ProgressCallback


# "context": the context is read and compressed, then come question and answer, each question on a copy of the cache.
# "question": context and question are read together and compressed, then comes the answer.
PROTOCOLS = ("context", "question")


# The name of a cache and its budget.
Setting = tuple[str, float]
# Contexts of one task, each with its rank.
Batch = list[tuple[int, Context]]


@dataclass
class Result:
    """
    What one cache made of the cases of a task.

    Attributes:
        cache (`str`): Its name in `CACHES`, or `BASELINE`.
        budget (`float`): 1.0 for the full cache.
        scores (`list[Score]`): One per case, in the order of contexts and their questions.
        held_shares (`list[float]`): One per compression: the bytes that the cache held of those of the full one.
        num_turns (`int`): How many scores one after the other are of the turns of one conversation; 1 for other tasks.
    """

    task: str
    protocol: str
    cache: str
    budget: float
    scores: list[Score] = field(default_factory=list)
    held_shares: list[float] = field(default_factory=list)
    num_turns: int = 1


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
        batch_size (`int`): How many contexts of a task are read at a time, padded on the left.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        caches: dict[str, EvaluatedCache],
        budgets: Sequence[float],
        protocols: Sequence[str] = PROTOCOLS,
        store: CellStore | None = None,
        writing: Writing | None = None,
        batch_size: int = 1,
    ) -> None:
        self.model = model
        self.asker = Asker(model, writing)
        self.caches = caches
        self.budgets = budgets
        self.protocols = protocols
        self.store = CellStore() if store is None else store
        self.batch_size = batch_size

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
        for batch in batches_of(own, self.batch_size):
            for num_questions in self._ask(batch):
                for _ in range(num_questions):
                    progress(batch[0][1].task, next(counter), total)

    def results(self, contexts: Sequence[Context]) -> list[Result]:
        """What the store holds of all questions of these contexts, in an order that does not depend on who asked them when."""
        known = {(context.task, index) for index, context in enumerate_by_task(contexts)}
        settings = [(BASELINE, 1.0), *itertools.product(self.caches, self.budgets)]
        tasks = dict.fromkeys(context.task for context in contexts)
        order = itertools.product(tasks, self.protocols, settings)
        results = {(*place, *setting): Result(*place, *setting) for *place, setting in order}
        num_turns = {context.task: len(context.questions) for context in contexts if context.is_conversation}
        for result in results.values():
            result.num_turns = num_turns.get(result.task, 1)
        for key, cell in sorted(self.store.cells.items()):
            result = results.get((key.task, key.protocol, key.cache, key.budget))
            if result is not None and (key.task, key.context) in known:
                result.scores += itertools.starmap(Score, zip(cell.token_accuracy, cell.log_likelihood, strict=True))
                result.held_shares.append(cell.held_share)
        return [result for result in results.values() if result.scores]

    def _ask(self, batch: Batch) -> Iterator[int]:
        """Asks the questions of some contexts; yields how many are done."""
        if len(batch) == 1:
            yield from self._ask_caches(batch, self.caches)
            return
        yield from self._ask_caches(batch, {name: row for name, row in self.caches.items() if row.takes_batches})
        others = {name: row for name, row in self.caches.items() if not row.takes_batches}
        for single in batch if others else ():
            for _ in self._ask_caches([single], others):
                pass

    def _ask_caches(self, batch: Batch, caches: dict[str, EvaluatedCache]) -> Iterator[int]:
        """Asks the questions of some contexts of some of the caches, and of the full one; yields how many are done."""
        contexts = [context for _, context in batch]
        # Where all is known already, there is nothing to read.
        find_reader = functools.cache(lambda: Reader(self.model, *self._pad([context.ids for context in contexts])))
        if "context" in self.protocols:
            self._ask_after_context(batch, caches, find_reader)
            yield sum(len(context.questions) for context in contexts)
        if "question" in self.protocols:
            num_asked = 0
            for number in range(max(len(context.questions) for context in contexts)):
                chosen = [place for place in batch if number in in_view(place[1])]
                if chosen:
                    self._ask_in_view(chosen, number, caches, find_reader if len(chosen) == len(batch) else None)
                    num_asked += len(chosen)
                    yield len(chosen)
            # Those of one token, and later turns.
            yield sum(len(context.questions) for context in contexts) - num_asked
        self._ask_streams(batch, caches, find_reader)

    def _ask_after_context(
        self, batch: Batch, caches: dict[str, EvaluatedCache], find_reader: Callable[[], Reader]
    ) -> None:
        missing = self._missing(batch, ALL_QUESTIONS, "context", caches, "dense", "own")
        if not missing:
            return
        reader = find_reader()
        full = full_cache(self.model, reader.context)
        num_later = max(len_behind(context) for _, context in batch)
        for setting, keys in missing.items():
            if setting[0] == BASELINE:
                cache = full
            elif caches[setting[0]].reading == "dense":
                cache = self._fill(setting, reader.context, num_later)
            else:
                cache, _ = self._read(setting, [context.ids for _, context in batch], num_later)
            scores = self._answer_all(setting, cache, batch, reader.padding)
            for row, key in keys.items():
                self._note(key, scores[row], num_bytes(cache) / num_bytes(full))

    def _ask_in_view(
        self,
        batch: Batch,
        number: int,
        caches: dict[str, EvaluatedCache],
        find_reader: Callable[[], Reader] | None,
    ) -> None:
        """
        Asks a question that is read with its context, and the later ones of a conversation behind it. The reader has read the
        contexts of the batch, if there is one.
        """
        in_turn = batch[0][1].is_conversation
        missing = self._missing(batch, ALL_QUESTIONS if in_turn else number, "question", caches, "dense", "own")
        if not missing:
            return
        turns = [context.questions if in_turn else [context.questions[number]] for _, context in batch]
        firsts = [questions[0].ids for questions in turns]
        prompts = [context.ids + first for (_, context), first in zip(batch, firsts, strict=True)]
        if find_reader is not None and len(set(map(len, firsts))) == 1:
            reading, padding = find_reader().with_question(self._batch(firsts)), find_reader().padding
        else:
            reader = Reader(self.model, *self._pad(prompts))
            reading, padding = reader.context, reader.padding
        num_later = max(sum(turn.num_tokens for turn in questions) - len(questions[0].ids) - 1 for questions in turns)
        full_bytes = num_bytes(full_cache(self.model, reading))
        for setting, keys in missing.items():
            logits = reading.logits
            if setting[0] == BASELINE:
                cache = full_cache(self.model, reading)
            elif caches[setting[0]].reading == "dense":
                cache = self._fill(setting, reading, num_later)
            else:
                cache, logits = self._read(setting, prompts, num_later)
            held_share = num_bytes(cache) / full_bytes
            scores = self.asker.ask_rows_in_turn(cache, turns, self._is_by_step(setting), logits, padding)
            for row, key in keys.items():
                self._note(key, scores[row], held_share)

    def _ask_streams(self, batch: Batch, caches: dict[str, EvaluatedCache], find_reader: Callable[[], Reader]) -> None:
        """Both protocols at once: they are the same to these caches, but for a budget that counts the question as well."""
        asked = {
            "context": [list(range(len(context.questions))) for _, context in batch],
            "question": [in_view(context, with_turns=True) for _, context in batch],
        }
        by_setting: dict[Setting, list[tuple[int, CellKey]]] = {}
        for protocol in self.protocols:
            for setting, keys in self._missing(batch, ALL_QUESTIONS, protocol, caches, "stream").items():
                by_setting.setdefault(setting, []).extend(
                    (row, key) for row, key in keys.items() if asked[protocol][row]
                )
        num_later = max(len_behind(context) for _, context in batch)
        for setting, places in by_setting.items():
            if not places:
                continue
            reader = find_reader()
            cache, _ = self._read(setting, [context.ids for _, context in batch], num_later)
            held_share = num_bytes(cache) / num_bytes(full_cache(self.model, reader.context))
            scores = self._answer_all(setting, cache, batch, reader.padding)
            for row, key in places:
                self._note(key, [scores[row][number] for number in asked[key.protocol][row]], held_share)

    def _missing(
        self, batch: Batch, question: int, protocol: str, caches: dict[str, EvaluatedCache], *readings: str
    ) -> dict[Setting, dict[int, CellKey]]:
        """
        What has not been measured of the caches that read prompts in one of these ways, of the full one too if "dense": for each
        cache and budget the rows of the batch.
        """
        names = [name for name, cache in caches.items() if cache.reading in readings]
        settings = list(itertools.product(names, self.budgets))
        if "dense" in readings:
            settings.insert(0, (BASELINE, 1.0))
        missing = {}
        for setting in settings:
            keys = {
                row: CellKey(context.task, index, question, protocol, *setting)
                for row, (index, context) in enumerate(batch)
            }
            keys = {row: key for row, key in keys.items() if key not in self.store}
            if keys:
                missing[setting] = keys
        return missing

    # Reading.

    def _batch(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(rows, device=self.model.device)

    def _pad(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        return pad_left(rows, self.model.device)

    def _fill(self, setting: Setting, reading: Reading, num_later: int) -> CompressedCache:
        """A new cache that holds what it keeps of prompts that were read with full attention."""
        name, budget = setting
        cache = self.caches[name].build(self.model, budget, reading.num_tokens, num_later)
        with torch.no_grad():
            cache.replay(reading.layers)
        return cache

    @torch.no_grad()
    def _read(
        self, setting: Setting, rows: Sequence[list[int]], num_later: int
    ) -> tuple[CompressedCache, torch.Tensor]:
        """A new cache that has read prompts itself, and the logits `(rows, vocabulary)` of the last token of each."""
        name, budget = setting
        ids, padding = self._pad(rows)
        cache = self.caches[name].build(self.model, budget, ids.shape[1], num_later)
        arguments = padding_arguments(padding, 0, ids.shape[1])
        return cache, self.model(ids, **{CACHE_ARGUMENT: cache}, logits_to_keep=1, **arguments).logits[:, -1]

    # Answers.

    def _answer_all(
        self, setting: Setting, cache: Cache, batch: Batch, padding: torch.Tensor | None
    ) -> list[list[Score]]:
        """For each context that a cache has read, scores of the answers to all its questions."""
        by_step = self._is_by_step(setting)
        contexts = [context for _, context in batch]
        if contexts[0].is_conversation:
            return self.asker.ask_rows_in_turn(
                cache, [context.questions for context in contexts], by_step, padding=padding
            )
        if len(batch) == 1:
            return [self.asker.ask_each(cache, contexts[0].questions, by_step)]
        questions = [question for context in contexts for question in context.questions]
        rows = [row for row, context in enumerate(contexts) for _ in context.questions]
        scores = iter(self.asker.ask_each(cache, questions, by_step, rows, padding))
        return [list(itertools.islice(scores, len(context.questions))) for context in contexts]

    def _is_by_step(self, setting: Setting) -> bool:
        return setting[0] != BASELINE and self.caches[setting[0]].reads_answers_by_step

    def _note(self, key: CellKey, scores: Sequence[Score], held_share: float) -> None:
        accuracies, likelihoods = zip(*((score.token_accuracy, score.log_likelihood) for score in scores), strict=True)
        self.store.add(Cell(key, list(accuracies), list(likelihoods), held_share))


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


def in_view(context: Context, with_turns: bool = False) -> list[int]:
    """
    Which questions are read with the context: those about which a cache that has evicted then has anything to say. The first
    token of an answer follows from a full reading of the prompt. Of a conversation it is the first question; with its later
    turns, all.
    """
    if context.is_conversation:
        return list(range(len(context.questions) if with_turns else 1))
    return [number for number, question in enumerate(context.questions) if len(question.answer) > 1 or question.metric]


def len_behind(context: Context) -> int:
    """How many tokens a model reads behind a context at most to be asked and scored on all of an answer."""
    lengths = [question.num_tokens for question in context.questions]
    return (sum(lengths) if context.is_conversation else max(lengths)) - 1


def num_bytes(cache: Cache) -> int:
    """What a cache takes: a full one its keys and values."""
    if isinstance(cache, CompressedCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
