"""The demo's runs: many prompts answered at once, and one text that is read once and asked about later."""

import copy
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache

from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.lab.demo.planted_numbers import Prompts, SharedText
from pyramid_cache.lab.loaded_model import LoadedModel
from pyramid_cache.lab.registry import Contender, Workload
from pyramid_cache.lab.timed_generation import generate, held_bytes
from pyramid_cache.lab.weights import ProgressCallback
from pyramid_cache.plot.held import kept_positions


WARM_UP_TOKENS = 64


@dataclass(frozen=True)
class PromptRun:
    """What one cache did with the prompts."""

    contender: Contender
    prefill_seconds: float
    step_seconds: float  # the median of its decode steps
    held_bytes: int  # at the end
    positions: torch.Tensor  # (layers, positions): the share of the heads that hold each of the first row, at the end
    answers: list[str]


@dataclass(frozen=True)
class TextRun:
    """What one cache did with the text and the questions about it."""

    contender: Contender
    reading_seconds: float  # compression included
    answer_seconds: float  # of a question and its answer, on average
    held_bytes: int  # after reading
    answers: list[str]


def answer_prompts(
    loaded: LoadedModel, prompts: Prompts, contenders: list[Contender], max_new_tokens: int, progress: ProgressCallback
) -> list[PromptRun]:
    """Answers the prompts with each cache, by plain `generate`."""
    model, input_ids = loaded.model, prompts.input_ids.to(loaded.model.device)
    workload = Workload(prompts.num_tokens, len(prompts.numbers), max_new_tokens)
    caches = [
        contender.build(model, workload) for contender in contenders
    ]  # what is refused is refused before anything runs
    warm_up(loaded, input_ids)
    runs = []
    for contender in contenders:
        progress(f"{contender.label}: reading {prompts.num_tokens:,} tokens", 0, None)
        cache = caches.pop(0)
        on_token = lambda done, text=contender.label: progress(f"{text}: answering", done, max_new_tokens)  # noqa: E731
        sequences, stopwatch = generate(model, input_ids, cache, max_new_tokens, on_token)
        runs.append(
            PromptRun(
                contender,
                stopwatch.prefill_seconds,
                statistics.median(stopwatch.seconds_of_steps),
                held_bytes(cache),
                kept_positions(cache, sequences.shape[1] - 1),
                [loaded.answer(row) for row in sequences[:, prompts.num_tokens :].tolist()],
            )
        )
        del cache  # before the next one fills the memory
    return runs


def answer_questions(
    loaded: LoadedModel, text: SharedText, contenders: list[Contender], max_new_tokens: int, progress: ProgressCallback
) -> list[TextRun]:
    """Reads the text once with each cache, and answers each question with a copy of the cache."""
    device = loaded.model.device
    text_ids, questions = text.input_ids.to(device), [question.to(device) for question in text.questions]
    workload = Workload(text_ids.shape[1], num_later=max(len(each[0]) for each in questions) + max_new_tokens)
    caches = [contender.build(loaded.model, workload) for contender in contenders]
    runs = []
    for contender in contenders:
        progress(f"{contender.label}: reading {text_ids.shape[1]:,} tokens once", 0, None)
        cache = caches.pop(0)
        start = now(device)
        read(loaded.model, text_ids, cache)
        reading_seconds, num_bytes = now(device) - start, held_bytes(cache)
        answers, seconds = [], 0.0
        for done, question in enumerate(questions, start=1):
            progress(f"{contender.label}: answering questions", done, len(questions))
            prompt, of_question = torch.cat([text_ids, question], dim=1), copy.deepcopy(cache)
            start = now(device)
            sequences, _ = generate(loaded.model, prompt, of_question, max_new_tokens)
            seconds += now(device) - start
            answers.append(loaded.answer(sequences[0, prompt.shape[1] :].tolist()))
        runs.append(TextRun(contender, reading_seconds, seconds / len(questions), num_bytes, answers))
        del cache, of_question
    return runs


@torch.no_grad()
def read(model: Any, input_ids: torch.Tensor, cache: Cache) -> None:
    """Reads a text of one row."""
    model(input_ids, **{CACHE_ARGUMENT: cache}, logits_to_keep=1)


def warm_up(loaded: LoadedModel, input_ids: torch.Tensor) -> None:
    """Lets the device choose its kernels and get its memory. On a CPU a piece of the prompts will do."""
    is_cpu = input_ids.device.type == "cpu"
    generate(loaded.model, input_ids[:, :WARM_UP_TOKENS] if is_cpu else input_ids, DynamicCache(), 4)


def now(device: torch.device) -> float:
    """Seconds, when the device has done its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
