"""Answer requests of different lengths in left-padded batches whose cache keeps within a limit in bytes.

    python examples/serve_batches.py --requests requests.jsonl --out answers.jsonl --memory 64MiB --budget 512

A request is a line of JSON: {"prompt": "..."}, and optionally "id" and "max_new_tokens". Answers are lines of JSON in
the order of the requests. Each is written as soon as those before it are there.

Each layer keeps `--budget` tokens of each request, and a batch has as many requests as the limit pays for. Requests of
similar length go together, so a batch of short requests is larger. An answer does not depend on the other requests of
its batch. With --use-all the limit itself is the budget of the cache: a batch that leaves memory over keeps more
tokens.

The limit counts what the cache holds between steps. While prompts are read, one layer at a time holds all of them, and
the model's activations need memory as well. Without --requests the script answers some made-up ones.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from script_options import CACHE_CLASSES, add_model_options, build_cache, load_model, run, setting
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyramid_cache import KIVICache, PolicyCache, PyramidCache, StreamingLLMCache, VLCache
from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.engine.budget import parse_budget
from pyramid_cache.engine.replay import ReplayingCache
from pyramid_cache.lab.terminal import check_output, positive_int


# Caches that hold a budget however long the answer gets, and take it in bytes. PyramidCache and VLCache hold more of a
# padded batch, whose rows are longest in different layers. StreamingLLMCache holds its sinks twice, and caches that
# read prompts twice hold a replay. KIVICache holds all tokens.
BOUNDED_CACHES = sorted(
    name
    for name, found in CACHE_CLASSES.items()
    if issubclass(found, PolicyCache)
    and not issubclass(found, (KIVICache, PyramidCache, StreamingLLMCache, VLCache, ReplayingCache))
)
# Tokens of the probe that measures the bytes of a token. Caches learn only from prompts of several tokens.
NUM_PROBED = 8
FIELDS = {"id", "prompt", "max_new_tokens"}
EXAMPLE_PROMPTS = (
    "Name three colours.",
    "What is the capital of France?",
    "Write one sentence about the sea. " + "It should be short and friendly, and mention a ship. " * 12,
    "Say hello.",
    "Which number comes next? " + ", ".join(map(str, range(1, 80))),
    "Name an animal that lives in the forest.",
)


@dataclass(frozen=True)
class Request:
    """One request."""

    identifier: Any  # marks the answer: the `id`, or the number of the line
    ids: list[int]  # the prompt, in the chat template if there is one
    max_new_tokens: int

    @property
    def num_tokens(self) -> int:
        """How many tokens a cache that evicts nothing holds at the end."""
        return len(self.ids) + self.max_new_tokens


def read_requests(lines: list[str], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> list[Request]:
    """
    Reads lines of JSON; empty ones are left out.

    Args:
        max_new_tokens (`int`): For requests that do not say it.

    Raises:
        ValueError: A line is no request; the message names it.
    """
    requests = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number} is no JSON: {error}") from error
        if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str) or not fields["prompt"]:
            raise ValueError(f'Line {number} is no object with a text as "prompt".')
        if unknown := fields.keys() - FIELDS:
            raise ValueError(f"Line {number} has {sorted(unknown)}, which no request has. Give {sorted(FIELDS)}.")
        wanted = fields.get("max_new_tokens", max_new_tokens)
        if type(wanted) is not int or wanted < 1:
            raise ValueError(f'Line {number}: "max_new_tokens" is {wanted!r}, but must be a positive integer.')
        requests.append(Request(fields.get("id", number), prompt_ids(tokenizer, fields["prompt"]), wanted))
    return requests


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The token ids of a prompt."""
    if not tokenizer.chat_template:
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass(frozen=True)
class Room:
    """What a limit in bytes pays for."""

    limit: int  # bytes that the cache may hold
    budget: int  # tokens that each layer keeps of each request
    num_layers: int  # layers that evict
    bytes_per_token: int  # of one token in one layer of one row
    eviction_interval: int  # tokens that a layer lets in before as many go
    bytes_per_row: int = 0  # bookkeeping of a row beside its tokens, which no budget in bytes counts

    @staticmethod
    @torch.no_grad()
    def of(model: PreTrainedModel, name: str, limit: int, budget: int, settings: dict[str, Any]) -> "Room":
        """Measures how many bytes a token takes, by letting a cache see some."""
        cache = build_cache(name, model, budget, **settings)
        probe = torch.arange(NUM_PROBED, device=model.device)[None]
        model(probe, **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
        layers = cache.compressed_layers
        bytes_per_token = layers[0].bytes_per_token
        # This counts the few tokens of the probe too, which errs on the safe side.
        bytes_per_row = sum(roles["bookkeeping"] for roles in cache.memory().values())
        return Room(limit, budget, len(layers), bytes_per_token, layers[0].eviction_interval, bytes_per_row)

    def bytes_for_tokens(self, num_requests: int) -> int:
        """What a batch of so many requests leaves for tokens."""
        return self.limit - num_requests * self.bytes_per_row

    def bytes_needed(self, requests: list[Request]) -> int:
        """What the tokens of a batch take."""
        longest = max(len(request.ids) for request in requests) + max(request.max_new_tokens for request in requests)
        num_slots = min(longest, self.budget) + self.eviction_interval
        return len(requests) * num_slots * self.num_layers * self.bytes_per_token

    def fits(self, requests: list[Request]) -> bool:
        """Whether a batch of these requests stays within the limit."""
        return self.bytes_needed(requests) <= self.bytes_for_tokens(len(requests))


def batches_of(requests: list[Request], room: Room, max_batch_size: int) -> list[list[int]]:
    """
    Groups requests, the shortest first, because padding takes memory as tokens do.

    Returns:
        `list[list[int]]`: Indices of requests.

    Raises:
        ValueError: A request does not fit even alone.
    """
    batches: list[list[int]] = [[]]
    for index in sorted(range(len(requests)), key=lambda index: requests[index].num_tokens):
        if not room.fits([requests[index]]):
            least = room.bytes_needed([requests[index]]) + room.bytes_per_row
            raise ValueError(
                f"{room.limit:,} bytes cannot hold request {requests[index].identifier!r} alone, which takes "
                f"{least:,}. Raise --memory, or lower --budget."
            )
        together = [*batches[-1], index]
        if len(together) > max_batch_size or not room.fits([requests[member] for member in together]):
            batches.append([])
        batches[-1].append(index)
    return [batch for batch in batches if batch]


def left_padded(requests: list[Request], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both `(batch, longest)`."""
    rows = [torch.tensor(request.ids) for request in requests]
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    return pad(rows, padding_value=pad_token_id), pad([torch.ones_like(row) for row in rows])


def answers_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: Any, requests: list[Request]
) -> list[str]:
    """The answers of one batch."""
    ids, mask = left_padded(requests, tokenizer.pad_token_id)
    output = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        **{CACHE_ARGUMENT: cache},
        max_new_tokens=max(request.max_new_tokens for request in requests),
    )
    ends = set(model.generation_config.eos_token_id or [])
    answers = []
    for request, row in zip(requests, output[:, ids.shape[1] :].tolist(), strict=True):
        row = row[: request.max_new_tokens]
        length = next((i for i, token in enumerate(row) if token in ends), len(row))
        answers.append(tokenizer.decode(row[:length], skip_special_tokens=True).strip())
    return answers


def serve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: list[Request],
    room: Room,
    options: argparse.Namespace,
) -> Iterator[tuple[int, str]]:
    """Answers all requests, and says on stderr what each batch took. Gives the index of a request and its answer."""
    for batch in batches_of(requests, room, options.max_batch_size):
        members = [requests[index] for index in batch]
        budget = f"{room.bytes_for_tokens(len(batch))}B" if options.use_all else room.budget
        cache = build_cache(options.cache, model, budget, **dict(options.setting))
        start = time.perf_counter()
        answers = answers_of(model, tokenizer, cache, members)
        print(
            f"batch of {len(batch)}: prompts of {min(len(member.ids) for member in members)} to "
            f"{max(len(member.ids) for member in members)} tokens, {max(cache.num_kept_tokens())} kept, "
            f"{cache.nbytes:,} bytes of {room.limit:,}, {time.perf_counter() - start:.1f} s",
            file=sys.stderr,
        )
        yield from zip(batch, answers, strict=True)


def in_order(answers: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Sorts the pairs by index. Each is given as soon as those before it have come."""
    waiting: dict[int, str] = {}
    following = 0
    for index, answer in answers:
        waiting[index] = answer
        while following in waiting:
            yield following, waiting.pop(following)
            following += 1


def memory_limit(text: str) -> int:
    """Reads `--memory`, a number of bytes."""
    try:
        budget = parse_budget(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return int(budget.amount)


def main() -> None:
    """Read requests, answer them in batches, and write the answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=Path, metavar="FILE", help="lines of JSON (default: some made-up ones)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the answers go (default: stdout)")
    parser.add_argument(
        "--memory", type=memory_limit, default="32MiB", help="what a batch's cache may hold (default: 32MiB)"
    )
    parser.add_argument(
        "--budget", type=positive_int, default=128, metavar="N", help="tokens per layer and request (default: 128)"
    )
    parser.add_argument("--use-all", action="store_true", help="share the memory that a batch leaves over")
    parser.add_argument(
        "--cache",
        choices=BOUNDED_CACHES,
        default="SnapKVCache",
        metavar="NAME",
        help=f"one of {', '.join(BOUNDED_CACHES)} (default: SnapKVCache)",
    )
    parser.add_argument(
        "--setting", type=setting, action="append", default=[], metavar="NAME=VALUE", help="an argument of the cache"
    )
    parser.add_argument("--max-batch-size", type=positive_int, default=64, metavar="N", help="default: 64")
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        default=24,
        metavar="N",
        help="of requests that do not say (default: 24)",
    )
    add_model_options(parser)
    options = parser.parse_args()
    check_output("--out", options.out)
    lines = [json.dumps({"prompt": prompt}) for prompt in EXAMPLE_PROMPTS]
    if options.requests is not None:
        lines = options.requests.read_text(encoding="utf-8").splitlines()
    model, tokenizer = load_model(options)
    requests = read_requests(lines, tokenizer, options.max_new_tokens)
    room = Room.of(model, options.cache, options.memory, options.budget, dict(options.setting))
    with nullcontext(sys.stdout) if options.out is None else options.out.open("w", encoding="utf-8") as file:
        for index, answer in in_order(serve(model, tokenizer, requests, room, options)):
            request = requests[index]
            file.write(json.dumps({"id": request.identifier, "answer": answer}, ensure_ascii=False) + "\n")
            file.flush()


if __name__ == "__main__":
    run(main)
