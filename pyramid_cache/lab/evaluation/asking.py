"""Questions put to a cache that has read their contexts, and how right the answers are."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import Cache, PreTrainedModel

from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.lab.evaluation.reading import padding_arguments
from pyramid_cache.lab.evaluation.tasks.cases import Question


# Questions on copies of a cache are asked side by side, as far as the copies have no more tokens in all than this.
MAX_COPIED_TOKENS = 16384

# The row of a cache that has read the context, and questions that follow each other behind it.
Thread = tuple[int, Sequence[Question]]


@dataclass(frozen=True)
class Score:
    """How right an answer is."""

    # The share of its tokens that the model finds most likely, each behind the right ones. Of several values: the
    # share of those all of whose tokens are found.
    token_accuracy: float
    log_likelihood: float  # the mean of the log-probabilities of its tokens, or of those of its values

    @property
    def is_exact(self) -> bool:
        """Whether all of it is what the model finds most likely."""
        return self.token_accuracy == 1


def score_answers(
    logits: torch.Tensor, answers: torch.Tensor, values: Sequence[Sequence[Sequence[int]]] | None = None
) -> list[Score]:
    """
    Compares logits `(rows, tokens, vocabulary)` with the token ids `(rows, tokens)` of right answers. `values` says
    where the values of each row begin and end; it is empty for a row that is one value.
    """
    is_right = logits.argmax(dim=-1) == answers
    chosen = logits.float().log_softmax(dim=-1).gather(-1, answers[..., None]).squeeze(-1)
    scores = []
    for row, spans in enumerate([[]] * len(answers) if values is None else values):
        if not spans:
            scores.append(Score(is_right[row].float().mean().item(), chosen[row].mean().item()))
            continue
        found = [is_right[row, start:stop].all().item() for start, stop in spans]
        likely = torch.cat([chosen[row, start:stop] for start, stop in spans])
        scores.append(Score(sum(found) / len(found), likely.mean().item()))
    return scores


@torch.no_grad()
def ask(
    model: PreTrainedModel,
    cache: Cache,
    threads: Sequence[Thread],
    first_logits: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    by_step: bool = False,
    copies_rows: bool = True,
) -> list[list[Score]]:
    """
    Scores of the answers of each thread, which is asked on a copy of its row of a cache that has read the contexts.
    Each of its questions follows the one before and its right answer. Answers are read in one forward pass, or
    `by_step`.

    Args:
        first_logits (`torch.Tensor`, *optional*): `(batch, vocabulary)`, what the model says behind each row. The
            cache has then read the first questions as well, which are given without tokens.
        padding (`torch.Tensor`, *optional*): `(batch,)`, how many columns of padding each row begins with.
        copies_rows (`bool`, defaults to `True`): Whether the cache makes many rows of one. Otherwise it has one row,
            and threads are asked one after the other.
    """
    most = max(MAX_COPIED_TOKENS // max(cache.get_seq_length(), 1), 1) if copies_rows else 1
    found: dict[int, list[Score]] = {}
    for group in groups_of_equal_length(threads, most):
        rows = torch.tensor([threads[index][0] for index in group], device=model.device)
        asked = copy.deepcopy(cache) if copies_rows else shallow_copy(cache)
        if len(threads) > 1 and copies_rows:
            asked.batch_select_indices(rows)
        said = [] if first_logits is None else [first_logits[rows, None]]
        own = None if padding is None else padding[rows]
        scores: list[list[Score]] = []
        carried: list[int] = []
        for questions in zip(*(threads[index][1] for index in group), strict=True):
            answers = torch.tensor([question.answer for question in questions], device=model.device)
            read = [[*carried, *question.ids, *question.answer[:-1]] for question in questions]
            num_logits = answers.shape[1] - len(said)
            if num_logits:
                ids = torch.tensor(read, device=model.device)
                said.append(read_behind(model, asked, ids, num_logits, by_step, own))
            scores.append(score_answers(torch.cat(said, dim=1), answers, [question.values for question in questions]))
            # The last token of an answer is read with the next question: nothing of its own is said behind it.
            carried, said = questions[0].answer[-1:], []
        found |= zip(group, map(list, zip(*scores, strict=True)), strict=True)
    return [found[index] for index in range(len(threads))]


def shallow_copy(cache: Cache) -> Cache:
    """A copy of a cache whose layers put new tensors in the place of old ones, and write into none."""
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    return found


def read_behind(
    model: PreTrainedModel,
    cache: Cache,
    ids: torch.Tensor,
    num_logits: int,
    by_step: bool,
    padding: torch.Tensor | None,
) -> torch.Tensor:
    """The last `num_logits` logits `(rows, num_logits, vocabulary)` of tokens `(rows, tokens)`."""
    num_first = ids.shape[1] - num_logits + 1 if by_step else ids.shape[1]
    logits = []
    for piece in (ids[:, :num_first], *ids[:, num_first:].split(1, dim=1)):
        if num_new := piece.shape[1]:
            arguments = padding_arguments(padding, cache.get_seq_length(), num_new)
            arguments["logits_to_keep"] = min(num_logits, num_new)
            logits.append(model(piece, **{CACHE_ARGUMENT: cache}, **arguments).logits)
    return torch.cat(logits, dim=1)[:, -num_logits:]


def groups_of_equal_length(threads: Sequence[Thread], largest: int) -> Iterator[list[int]]:
    """The indices of threads in groups of at most `largest` to be asked side by side; a longer thread is alone."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, (_, (first, *later)) in enumerate(threads):
        groups.setdefault((index,) if later else (len(first.ids), len(first.answer)), []).append(index)
    for indices in groups.values():
        yield from (indices[start : start + largest] for start in range(0, len(indices), largest))
