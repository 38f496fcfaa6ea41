"""Measure what ShadowKVCache loses, at several sparse budgets and lengths, against the full cache.

    python examples/evaluate_shadow_kv.py --out shadow.json

Three things are measured, each answer read token by token: questions for numbers that are hidden in a novel, the next
`--new-tokens` of the novel, and a conversation that asks for five of the numbers one after the other.
"""

import argparse
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, PreTrainedModel

from pyramid_cache import ShadowKVCache
from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.lab.evaluation.asking import score_answers
from pyramid_cache.lab.evaluation.evaluator import Evaluation, Result
from pyramid_cache.lab.evaluation.tasks import Context, Haystack, Question, build_contexts, parse_task
from pyramid_cache.lab.machine import describe_machine, describe_versions
from pyramid_cache.lab.registry import BASELINE, CacheEntry
from pyramid_cache.lab.terminal import ProgressBar, check_output, write_json
from pyramid_cache.lab.weights import fetch_default_model


NUM_TURNS = 5


def continuations(novel: list[int], num_tokens: int, num_new: int, limit: int) -> Iterator[Context]:
    """Stretches of the novel, and how they go on."""
    for index in range(limit):
        start = index * (len(novel) - num_tokens - num_new - 1) // limit
        ids = novel[start : start + num_tokens + num_new + 1]
        yield Context(f"novel-{num_tokens}", ids[:num_tokens], [Question([ids[num_tokens]], ids[num_tokens + 1 :])])


@torch.no_grad()
def turns(model: PreTrainedModel, cache: Cache, context: Context) -> list[float]:
    """The token accuracy of each answer of a conversation, whose questions follow one another behind the context."""
    read = torch.tensor([context.ids])
    model(read, **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
    accuracies = []
    for question in context.questions[:NUM_TURNS]:
        logits = []
        for piece in (question.ids, *([token] for token in question.answer)):
            logits.append(model(torch.tensor([piece]), **{CACHE_ARGUMENT: cache}, logits_to_keep=1).logits)
        scores = score_answers(torch.cat(logits[:-1], dim=1), torch.tensor([question.answer]))
        accuracies.append(scores[0].token_accuracy)
    return accuracies


def means(results: list[Result], budget: float) -> dict[str, float]:
    """Exact match, token accuracy and log-likelihood of the cache of that budget."""
    scores = [score for result in results if result.budget == budget for score in result.scores]
    return {
        "questions": len(scores),
        "exact_match": statistics.mean(score.is_exact for score in scores),
        "token_accuracy": statistics.mean(score.token_accuracy for score in scores),
        "log_likelihood": statistics.mean(score.log_likelihood for score in scores),
    }


def measure(
    model: PreTrainedModel, tokenizer: Any, options: argparse.Namespace, progress: Any
) -> Iterator[dict[str, Any]]:
    """One row per length and cache, as soon as it is there."""
    haystack = Haystack(tokenizer)
    for num_tokens, limit in zip(options.lengths, options.contexts, strict=True):
        names = ("rank", "chunk_size", "num_spread_bands")
        settings = {name: getattr(options, name) for name in names}
        shadow = CacheEntry("shadow", "ShadowKVCache", ShadowKVCache, settings, reads_answers_by_step=True)
        evaluation = Evaluation(model, {"shadow": shadow}, options.sparse_budgets, ["context"])
        needles = build_contexts(parse_task(f"needles-8-{num_tokens}"), haystack, options.seed, limit)
        found = evaluation.run(needles, progress)
        text = evaluation.run(list(continuations(haystack.novel, num_tokens, options.new_tokens, limit)), progress)
        for budget in (1.0, *options.sparse_budgets):
            label = BASELINE if budget == 1.0 else str(budget)
            progress(f"{NUM_TURNS} turns behind {num_tokens} tokens, {label}", 0, None)
            answers = []
            for context in needles:
                cache = (
                    DynamicCache(config=model.config)
                    if budget == 1.0
                    else ShadowKVCache(model.config, budget, **settings)
                )
                answers.append(turns(model, cache, context))
            yield {
                "num_tokens": num_tokens,
                "cache": label,
                **means(found, budget),
                "perplexity": math.exp(-means(text, budget)["log_likelihood"]),
                "token_accuracy_by_turn": [statistics.mean(turn) for turn in zip(*answers, strict=True)],
            }


def as_line(row: dict[str, Any]) -> str:
    """A row of the table."""
    turn_cells = " ".join(f"{accuracy:.2f}" for accuracy in row["token_accuracy_by_turn"])
    label = "DynamicCache" if row["cache"] == BASELINE else f"ShadowKVCache, {row['cache']}"
    return (
        f"| {row['num_tokens']:,} | {label} | {row['exact_match']:.2f} / {row['token_accuracy']:.3f} / "
        f"{row['log_likelihood']:.2f} | {row['perplexity']:.2f} | {turn_cells} |"
    )


def main() -> None:
    """Measure, print the table and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help="folder or hub id; without, SmolLM2-135M-Instruct")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8000], help="tokens of a context")
    parser.add_argument("--contexts", type=int, nargs="+", default=[5, 3, 2], help="how many of each length")
    parser.add_argument("--sparse-budgets", type=int, nargs="+", default=[128, 256, 512, 1024], help="in tokens")
    parser.add_argument("--rank", type=int, default=160, help="of the keys, over all heads of a layer")
    parser.add_argument("--chunk-size", type=int, default=8, help="tokens that one landmark stands for")
    parser.add_argument("--num-spread-bands", type=int, default=4, help="spreads of a landmark beside its mean")
    parser.add_argument("--new-tokens", type=int, default=64, help="of the novel, behind each context")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the record")
    options = parser.parse_args()
    check_output("--out", options.out)
    messages = Console(stderr=True)
    folder = options.model or fetch_default_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    machine = describe_machine(torch.device("cpu"))
    print(
        "| tokens | cache | numbers: exact / token accuracy / log-likelihood | perplexity | token accuracy by turn |"
    )
    print("|---|---|---|---|---|")
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    versions = describe_versions()
    record: dict[str, Any] = {"rows": [], "settings": settings, "machine": machine, "versions": versions}
    with ProgressBar(messages) as progress:
        for row in measure(model, tokenizer, options, progress):
            print(as_line(row), flush=True)
            record["rows"].append(row)
            write_json(record, options.out)


if __name__ == "__main__":
    main()
