"""Run tasks of EleutherAI's lm-evaluation-harness with any cache.

    pip install 'pyramid_cache[lm-eval]'
    python examples/lm_eval_harness.py --tasks my_task --include-path folder-with-yaml --cache TOVACache --budget 0.25
    python examples/lm_eval_harness.py --tasks arc_easy --limit 50 --cache DynamicCache

Tasks and their data come from the hub, or from a folder with YAML files (`--include-path`).

What is compressed, and when:

- `generate_until`: each batch is generated with a new cache, which reads its prompts and evicts as it does for
  anybody. The first new token follows from a full reading of the prompt, those behind it from what is kept.
- `loglikelihood`, and with it multiple choice: the context but for its last tokens, one by default (`--held-back`), is
  read, and the cache evicts down to its budget. Those last tokens and the continuation are then read in one forward
  pass in view of what is kept: no score follows from a full reading, not even that of a continuation of one token.
  Each continuation is given to a copy of the cache, and a context that several share is read once. A budget that is a
  fraction is one of the context without the tokens that are held back, which a larger number makes a question that
  comes after compression.
- `loglikelihood_rolling`: refused but for DynamicCache, as its windows have no context to compress.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from script_options import add_cache_options, add_model_options, load_model, new_cache, run
from transformers import Cache, DynamicCache, PreTrainedModel

from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.lab.terminal import check_output, positive_int, positive_ints


try:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table
    from tqdm import tqdm
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "lm_eval":
        raise
    sys.exit("error: the package `lm_eval` is missing; run: pip install 'pyramid_cache[lm-eval]'")

# A pair of texts or None, the tokens of the context, and those of the continuation.
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]


class CacheLM(HFLM):
    """
    A model of the harness that keeps what a cache keeps; the docstring of this module says what is compressed, and
    when.

    Args:
        pretrained (`PreTrainedModel`): A decoder.
        build_cache (`Callable`): Called with the model; makes a new cache.
        num_held_back (`int`, defaults to 1): Tokens of a context that are read after it was compressed, one at least.
            Of a shorter context all but its first token.
        settings: Further arguments of `HFLM`, such as `tokenizer` and `batch_size`; that is of `generate_until` only.

    Raises:
        ValueError: `num_held_back` is less than 1, or the model is an encoder-decoder.
    """

    def __init__(
        self,
        pretrained: PreTrainedModel,
        build_cache: Callable[[PreTrainedModel], Cache],
        num_held_back: int = 1,
        **settings: Any,
    ) -> None:
        if isinstance(num_held_back, bool) or not isinstance(num_held_back, int) or num_held_back < 1:
            raise ValueError(f"`num_held_back={num_held_back!r}` must be an integer of at least 1.")
        if pretrained.config.is_encoder_decoder:
            raise ValueError(
                "An encoder-decoder reads the context with its encoder, where no cache of ours is. Use HFLM."
            )
        super().__init__(pretrained=pretrained, backend="causal", **settings)
        self.build_cache = build_cache
        self.num_held_back = num_held_back

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        return super()._model_generate(
            context, max_length, stop, **generation_kwargs, **{CACHE_ARGUMENT: self.build_cache(self.model)}
        )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        cache = self.build_cache(self.model)
        if not isinstance(cache, DynamicCache):
            raise NotImplementedError(
                f"`loglikelihood_rolling` with {type(cache).__name__}: windows of text have no context that could be "
                "compressed, and the figures would be those of the full cache. Use a task with contexts."
            )
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """The sum of the log-probabilities of each continuation, and whether it is what greedy decoding gives."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            # From the left, as HFLM: the last token of a continuation is not read.
            kept = max(self.max_length + 1 - len(continuation), 1)
            by_context.setdefault(tuple(context[-kept:]), []).append(index)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        progress = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="loglikelihood requests")
        for context, indices in by_context.items():
            compressed, held_back = self._compress(list(context))
            for index in indices:
                pair, _, continuation = requests[index]
                answers[index] = self._score(copy.deepcopy(compressed), held_back, continuation)
                if pair is not None:
                    self.cache_hook.add_partial("loglikelihood", pair, answers[index])
                progress.update()
        progress.close()
        return answers

    def _compress(self, context: list[int]) -> tuple[Cache, list[int]]:
        """A cache that has read the beginning of a context and evicted, and the tokens that are held back."""
        # A single token is left to be read with the continuation.
        start = 0 if len(context) == 1 else max(len(context) - self.num_held_back, 1)
        cache = self.build_cache(self.model)
        if start:
            self._read(cache, context[:start], logits_to_keep=1)
            if isinstance(cache, CompressedCache):
                cache.compress()
        return cache, context[start:]

    def _score(self, cache: Cache, held_back: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Reads what was held back and a continuation, and scores the continuation."""
        logits = self._read(cache, held_back + continuation[:-1], logits_to_keep=len(continuation))
        log_probabilities = torch.log_softmax(logits[0], dim=-1, dtype=self.softmax_dtype)
        target = torch.tensor(continuation, device=logits.device)
        scores = log_probabilities.gather(-1, target[:, None])
        return float(scores.sum()), bool((logits[0].argmax(dim=-1) == target).all())

    @torch.no_grad()
    def _read(self, cache: Cache, ids: list[int], logits_to_keep: int) -> torch.Tensor:
        """Logits `(1, logits_to_keep, vocabulary)` of the last of some tokens, which the cache sees."""
        with torch.autocast(
            self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        ):
            input_ids = torch.tensor([ids], device=self.device)
            return self.model(input_ids, **{CACHE_ARGUMENT: cache}, logits_to_keep=logits_to_keep).logits


def main() -> None:
    """Evaluate and print the harness's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", required=True, help="names of tasks, with commas between them")
    parser.add_argument("--include-path", metavar="FOLDER", help="where YAML files of further tasks are")
    parser.add_argument(
        "--ruler-lengths", type=positive_ints, metavar="LIST", help="tokens of RULER's contexts (default: 4096)"
    )
    parser.add_argument("--limit", type=positive_int, metavar="N", help="documents of each task (default: all)")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each (default: the task's)")
    parser.add_argument(
        "--held-back", type=positive_int, default=1, metavar="N", help="tokens read after compression (default: 1)"
    )
    parser.add_argument("--batch-size", type=positive_int, default=1, metavar="N", help="of generation (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    add_model_options(parser)
    add_cache_options(parser, "MassiveActivationCache", "0.5")
    options = parser.parse_args()
    check_output("--json", options.json)
    model, tokenizer = load_model(options)
    new_cache(options, model)  # what cannot be built is refused before any data is fetched
    language_model = CacheLM(
        model,
        lambda model: new_cache(options, model),
        options.held_back,
        tokenizer=tokenizer,
        batch_size=options.batch_size,
    )
    # RULER makes its contexts for the tokenizer, in these lengths.
    metadata: dict[str, Any] = {"tokenizer": tokenizer.name_or_path}
    if options.ruler_lengths:
        metadata["max_seq_lengths"] = options.ruler_lengths
    results = lm_eval.simple_evaluate(
        model=language_model,
        tasks=options.tasks.split(","),
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        task_manager=TaskManager(include_path=options.include_path, metadata=metadata),
    )
    print(make_table(results))
    if options.json is not None:
        record = {"results": results["results"], "cache": options.cache, "held_back": options.held_back}
        options.json.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
