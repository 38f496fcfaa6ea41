"""Measure NVIDIA's kvpress on recall cases given as token ids.

kvpress needs transformers < 5.3, which `pyramid_cache` does not run on. So this script knows nothing of
`pyramid_cache`: it runs in an environment of its own and reads the cases from a file.

    python -m venv kvpress-env && kvpress-env/bin/pip install "kvpress==0.5.5" "transformers<5.3" torch
    kvpress-env/bin/python examples/evaluate_kvpress.py --cases cases.json --model MODEL --out kvpress.json

The cases file holds token ids, so that tokenizers of different versions cannot differ:

    {"contexts": [{"task": "needles-8-1024", "ids": [...], "questions": [{"ids": [...], "answer": [...]}]}]}

Two protocols. `context`: the context is read and compressed, then question and answer follow on the compressed cache.
`question`: context and question are read together and compressed, then the answer follows; the first token of the
answer comes from the dense reading there, as it does when `generate` runs under a press, so it is the same for each
press.

A press compresses a layer in a hook, once the layer has attended to the whole prompt. What it drops is thus still seen
by the layers above, and one dense reading of a prompt serves all presses and budgets: each gets the same hidden
states, keys and values. `--check` compares that with kvpress's own `with press(model)`, key by key.

KVzip reads the prompt once more: it has the model repeat the prompt on the full cache, and scores each key by the
attention that it gets then. The repetition is dropped again. One serves KVzip, KVzip+ and all budgets. The template of
the tokenizer in the model's folder tells KVzip where the context starts. In the protocol `question` the question is
repeated too, as it is under `with press(model)`. The authors of KVzip mean it for contexts alone.

AdaKV, CriticalAdaKV and KVzip mask keys and keep them in memory: `kept_fraction` counts keys that are attended to,
`bytes` what lies in memory while answers are read.

Tokens after the prompt keep their true positions, as in kvpress's pipeline. PyramidKV leaves layers with different
lengths; transformers 5.2 makes one mask for all layers, of the first one's length, and fails on a question of more
than one token. Each layer gets a mask of its own length here, or PyramidKV could not be measured.
"""

import argparse
import inspect
import json
import logging
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from kvpress import (
    AdaKVPress,
    CriticalAdaKVPress,
    CriticalKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVzipPress,
    ObservedAttentionPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from kvpress.presses.base_press import BasePress
from kvpress.utils import get_prerope_query_states
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.utils.logging import disable_progress_bar


PRESSES: dict[str, Callable[[float], BasePress]] = {
    "SnapKV": lambda ratio: SnapKVPress(compression_ratio=ratio),
    "PyramidKV": lambda ratio: PyramidKVPress(compression_ratio=ratio),
    "TOVA": lambda ratio: TOVAPress(compression_ratio=ratio),
    "KeyDiff": lambda ratio: KeyDiffPress(compression_ratio=ratio),
    "Knorm": lambda ratio: KnormPress(compression_ratio=ratio),
    "ExpectedAttention": lambda ratio: ExpectedAttentionPress(compression_ratio=ratio),
    "StreamingLLM": lambda ratio: StreamingLLMPress(compression_ratio=ratio),
    "ObservedAttention": lambda ratio: ObservedAttentionPress(compression_ratio=ratio),
    "AdaKV(SnapKV)": lambda ratio: AdaKVPress(SnapKVPress(compression_ratio=ratio)),
    "CriticalKV(SnapKV)": lambda ratio: CriticalKVPress(SnapKVPress(compression_ratio=ratio)),
    "CriticalAdaKV(SnapKV)": lambda ratio: CriticalAdaKVPress(SnapKVPress(compression_ratio=ratio)),
    "KVzip": lambda ratio: KVzipPress(compression_ratio=ratio),
    "KVzip+": lambda ratio: KVzipPress(compression_ratio=ratio, kvzip_plus_normalization=True),
}
WRAPPERS = (AdaKVPress, CriticalKVPress, CriticalAdaKVPress)  # the press in `press` scores keys
PROTOCOLS = ("context", "question")
FULL = ("full", 1.0)
QUERY_BLOCK = 512  # attention of 512 queries on 4,096 keys by 9 heads is 75 MB in float32; of all queries it is 604 MB

Setting = tuple[str, float]  # (press, budget)
HeadIndices = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # batch, head and position of each masked key


@dataclass
class Compressed:
    """What a press left of a prompt: keys and values by layer, `(1, kv_heads, kept, head_dim)`, and masked keys."""

    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    masked: list[HeadIndices | None] = field(default_factory=list)

    def bytes_held(self) -> int:
        """Bytes of memory behind keys and values: of whole storages, each counted once."""
        storages = {tensor.untyped_storage() for tensor in (*self.keys, *self.values)}
        return sum(size for _, size in {(storage.data_ptr(), storage.nbytes()) for storage in storages})

    def kept_fraction(self, prompt_tokens: int) -> float:
        """Mean over layers and heads of the keys that are still attended to, as a fraction of the prompt."""
        kept = [
            keys.shape[2] - (0 if masked is None else masked[0].numel() / keys.shape[1])
            for keys, masked in zip(self.keys, self.masked, strict=True)
        ]
        return statistics.mean(kept) / prompt_tokens

    def to_cache(self) -> DynamicCache:
        """A cache that starts from these tensors and appends to copies, so that this object serves many questions."""
        return DynamicCache(list(zip(self.keys, self.values, strict=True)))


@dataclass
class Dense:
    """A prompt as a model reads it without a press: what presses look at, layer by layer, and the last logits."""

    ids: list[int]
    keys: list[torch.Tensor] = field(default_factory=list)  # (1, kv_heads, tokens, head_dim)
    values: list[torch.Tensor] = field(default_factory=list)  # (1, kv_heads, tokens, head_dim)
    hidden_states: list[torch.Tensor] = field(default_factory=list)  # (1, tokens, hidden), inputs of attention
    attention: list[torch.Tensor] = field(default_factory=list)  # (1, heads, 1, tokens), summed over queries
    position_embeddings: tuple[torch.Tensor, ...] = ()  # cosines and sines, (1, tokens, head_dim)
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # (vocabulary,), after the last token

    @property
    def tokens(self) -> int:
        """Length of the prompt."""
        return len(self.ids)

    def to_cache(self) -> DynamicCache:
        """A cache that starts from these keys and values and appends to copies."""
        return DynamicCache(list(zip(self.keys, self.values, strict=True)))


def attention_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The attention module of each layer, first layer first."""
    return [layer.self_attn for layer in model.model.layers]


def summed_attention(
    module: nn.Module, hidden_states: torch.Tensor, keys: torch.Tensor, position_embeddings: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Causal attention probabilities, summed over the last queries in blocks.

    ObservedAttentionPress takes the sum over queries of what eager attention returns. Summed blocks are the same,
    and a prompt of 4,096 tokens does not need 604 MB for each layer.

    Args:
        module: Attention module of the layer.
        hidden_states: Its input at the last tokens, `(1, queries, hidden)`.
        keys: Rotated keys, `(1, kv_heads, seq, head_dim)`.
        position_embeddings: Cosines and sines of the last tokens, `(1, queries, head_dim)` each.

    Returns:
        `(1, heads, 1, seq)`.
    """
    queries = get_prerope_query_states(module, hidden_states)
    queries, _ = apply_rotary_pos_emb(queries, queries, *position_embeddings)
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1).transpose(2, 3)
    length, past = keys.shape[-1], keys.shape[-1] - queries.shape[2]
    total = queries.new_zeros(1, queries.shape[1], 1, length, dtype=torch.float32)
    for start in range(past, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        scores = (
            queries[:, :, start - past : stop - past] @ keys[..., :stop] * module.scaling
        )  # (1, heads, block, stop)
        future = torch.ones(stop - start, stop, dtype=torch.bool, device=scores.device).triu(start + 1)
        probabilities = scores.masked_fill(future, float("-inf")).softmax(-1, dtype=torch.float32)
        total[..., :stop] += probabilities.sum(2, keepdim=True)
    return total


@torch.no_grad()
def read(model: PreTrainedModel, ids: Sequence[int], before: Dense | None = None) -> Dense:
    """Read tokens densely, and keep what presses look at.

    Args:
        model: Language model with `sdpa` attention.
        ids: Token ids.
        before: What came before them. With causal attention a context need not be read again with each question.

    Returns:
        The whole prompt, with what came before.
    """
    cache = DynamicCache() if before is None else before.to_cache()
    dense = Dense(ids=[*(before.ids if before else ()), *ids])

    def record(module: nn.Module, _: tuple[()], kwargs: dict[str, Any], __: tuple[torch.Tensor, ...]) -> None:
        layer = cache.layers[module.layer_idx]
        hidden_states, rotation = kwargs["hidden_states"], kwargs["position_embeddings"]
        attention = summed_attention(module, hidden_states, layer.keys, rotation)
        if before is not None:
            attention[..., : before.tokens] += before.attention[module.layer_idx]
            hidden_states = torch.cat([before.hidden_states[module.layer_idx], hidden_states], dim=1)
            rotation = tuple(torch.cat(pair, dim=1) for pair in zip(before.position_embeddings, rotation, strict=True))
        dense.keys.append(layer.keys)
        dense.values.append(layer.values)
        dense.hidden_states.append(hidden_states)
        dense.attention.append(attention)
        dense.position_embeddings = rotation

    with ExitStack() as hooks:
        for module in attention_layers(model):
            hooks.callback(module.register_forward_hook(record, with_kwargs=True).remove)
        tokens = torch.tensor([ids], device=model.device)
        dense.logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits[0, -1]
    return dense


def repeat(model: PreTrainedModel, dense: Dense, settings: Sequence[Setting]) -> dict[Setting, Compressed]:
    """Have KVzip repeat a prompt once, and choose keys in each setting by the scores of that.

    Args:
        model: Language model that read the prompt, from a folder with its tokenizer.
        dense: The prompt. Its keys and values stand for the prefill that KVzip waits for.
        settings: KVzip or KVzip+ by name, with budgets: fractions of the keys of all layers to keep.

    Returns:
        What each setting keeps: all keys and values, of which some are masked.
    """
    modules, press = attention_layers(model), KVzipPress(compression_ratio=0.5)
    normalised = {name: PRESSES[name](0.5).kvzip_plus_normalization for name, _ in settings}
    attend, score, choose = press._compute_cross_attention, press.score_kvzip, press.compress_post
    scores: dict[str, torch.Tensor] = {}  # by press, (layers, 1, kv_heads, tokens)
    compressed: dict[Setting, Compressed] = {}

    def score_for_each_press(
        module: nn.Module, hidden_states: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attention = attend(module, hidden_states, keys, rest[-1])
        press._compute_cross_attention = lambda *_: attention
        for name, press.kvzip_plus_normalization in normalised.items():
            press.score_val = scores.setdefault(name, torch.zeros_like(press.score_val))
            kept = score(module, hidden_states, keys, values, *rest)
        return kept

    def choose_in_each_setting(model: PreTrainedModel) -> None:
        for name, budget in settings:
            press.compression_ratio, press.score_val = 1 - budget, scores[name].clone()  # choosing writes into it
            choose(model)
            masked = [vars(module).pop("masked_key_indices", None) for module in modules]
            compressed[name, budget] = Compressed(dense.keys, dense.values, masked)

    press.score_kvzip, press.compress_post = score_for_each_press, choose_in_each_setting
    with press(model):
        press._context_ids = torch.tensor([dense.ids], device=model.device)
        press._cache = dense.to_cache()
    return compressed


@torch.no_grad()
def compress(model: PreTrainedModel, dense: Dense, settings: Sequence[Setting]) -> dict[Setting, Compressed]:
    """Compress a prompt with each press to each budget.

    Args:
        model: Language model that read the prompt.
        dense: The prompt.
        settings: Presses by name, with budgets: fractions of the prompt to keep.

    Returns:
        What each setting keeps, `FULL` among them; nothing for a press that refuses the prompt.
    """
    compressed = {setting: Compressed() for setting in settings}
    presses = {(name, budget): PRESSES[name](1 - budget) for name, budget in settings}
    repeating = [setting for setting, press in presses.items() if isinstance(press, KVzipPress)]
    if repeating:
        compressed |= repeat(model, dense, repeating)
        presses = {setting: press for setting, press in presses.items() if setting not in repeating}
    for module, keys, values, hidden_states, attention in zip(
        attention_layers(model), dense.keys, dense.values, dense.hidden_states, dense.attention, strict=True
    ):
        module.rotary_emb = model.model.rotary_emb  # `with press(model)` sets it too; ExpectedAttention reads it
        kwargs = {"position_embeddings": dense.position_embeddings}
        scores: dict[Callable[..., torch.Tensor], torch.Tensor] = {}
        for setting, press in list(presses.items()):
            scorer = press.press if isinstance(press, WRAPPERS) else press
            attentions = attention.to(keys.dtype) if isinstance(scorer, ObservedAttentionPress) else None
            tensors = (module, hidden_states, keys, values, attentions, kwargs)
            try:
                # All presses have default parameters, so what one score function gives is the same for each budget;
                # but for StreamingLLM, whose score is the choice itself.
                if not isinstance(scorer, StreamingLLMPress):
                    function = type(scorer).score
                    if function not in scores:
                        scores[function] = function(scorer, *tensors)
                    scorer.score = lambda *_, known=scores[function]: known.clone()  # AdaKVPress writes into it
                kept_keys, kept_values = press.compress(*tensors)
            except AssertionError as error:  # how presses refuse prompts that are shorter than their window
                tqdm.write(f"{setting[0]} refuses a prompt of {dense.tokens} tokens: {error}")
                del presses[setting], compressed[setting]
                continue
            compressed[setting].keys.append(kept_keys)
            compressed[setting].values.append(kept_values)
            compressed[setting].masked.append(getattr(module, "masked_key_indices", None))
            module.masked_key_indices = None
    full = Compressed(dense.keys, dense.values, [None] * len(dense.keys))
    return {FULL: full} | compressed


@contextmanager
def prepared_layers(model: PreTrainedModel, prompt: Compressed) -> Iterator[None]:
    """Let each layer mask what its press masked, and see all of its own keys where layers hold different numbers."""

    def own_mask(module: nn.Module, args: tuple[()], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        tokens = kwargs["hidden_states"].shape[1]
        past = kwargs["past_key_values"].get_seq_length(module.layer_idx)
        mask = torch.ones(tokens, past + tokens, dtype=torch.bool, device=model.device).tril(past)
        return args, kwargs | {"attention_mask": mask[None, None]}

    uneven = len({keys.shape[2] for keys in prompt.keys}) > 1
    with ExitStack() as stack:
        for module, masked in zip(attention_layers(model), prompt.masked, strict=True):
            module.masked_key_indices = masked
            stack.callback(setattr, module, "masked_key_indices", None)
            if uneven:
                stack.callback(module.register_forward_pre_hook(own_mask, with_kwargs=True).remove)
        yield


@torch.no_grad()
def follow(
    model: PreTrainedModel, prompt: Compressed, position: int, tokens: Sequence[int], wanted: int
) -> tuple[torch.Tensor, bool]:
    """Read tokens after a compressed prompt.

    AdaKVPress masks a key by one fake key that all queries of a call point away from. Where kvpress finds none for
    all tokens at once, they are read one by one, as its pipeline reads answers.

    Args:
        model: Language model.
        prompt: Compressed prompt.
        position: Position of the first token: the length of the prompt before compression.
        tokens: Token ids.
        wanted: How many of the last logits to return.

    Returns:
        `(wanted, vocabulary)`, and whether the tokens were read one by one.
    """
    ids = torch.tensor([tokens], device=model.device)
    positions = torch.arange(position, position + len(tokens), device=model.device)[None]
    with prepared_layers(model, prompt):
        try:
            output = model(ids, past_key_values=prompt.to_cache(), position_ids=positions, logits_to_keep=wanted)
            return output.logits[0], False
        except ValueError as error:
            if "fake keys" not in str(error):
                raise
        cache = prompt.to_cache()
        logits = [
            model(ids[:, i : i + 1], past_key_values=cache, position_ids=positions[:, i : i + 1]).logits[0, -1]
            for i in range(len(tokens))
        ]
    return torch.stack(logits[-wanted:]), True


def mark(logits: torch.Tensor, answer: Sequence[int]) -> dict[str, Any]:
    """Compare logits, `(answer, vocabulary)`, with the answer: each token right or wrong, and its log-likelihood."""
    expected = torch.tensor(answer, device=logits.device)
    correct = (logits.argmax(-1) == expected).tolist()
    chosen = logits.float().log_softmax(-1).gather(-1, expected[:, None]).squeeze(-1).tolist()
    return {
        "exact": all(correct),
        "token_accuracy": statistics.mean(correct),
        "log_likelihood": statistics.mean(chosen),
        "correct": correct,
        "log_likelihoods": chosen,
    }


def measure(
    model: PreTrainedModel, contexts: Sequence[dict[str, Any]], protocols: Sequence[str], settings: Sequence[Setting]
) -> Iterator[list[dict[str, Any]]]:
    """Ask each question in each setting and protocol; yields a context's rows, each with every token of its answer."""
    questions = sum(len(context["questions"]) for context in contexts)
    vocabulary = model.config.vocab_size
    with tqdm(total=questions * len(protocols), unit="question", smoothing=0) as progress:
        for number, context in enumerate(contexts):
            rows: list[dict[str, Any]] = []
            dense = read(model, context["ids"])
            for protocol in protocols:
                compressed = compress(model, dense, settings) if protocol == "context" else {}
                for asked, question in enumerate(context["questions"]):
                    answer, rest, prompt = question["answer"], question["answer"][:-1], dense
                    if protocol == "context":
                        rest = [*question["ids"], *rest]
                    else:
                        prompt = read(model, question["ids"], before=dense)
                        compressed = compress(model, prompt, settings)
                    dense_bytes = compressed[FULL].bytes_held()
                    for (name, budget), kept in compressed.items():
                        # With the question in view, the dense reading of the prompt gives the first token.
                        logits = (
                            prompt.logits[None, :]
                            if protocol == "question"
                            else prompt.logits.new_empty(0, vocabulary)
                        )
                        one_by_one = False
                        if rest:
                            later, one_by_one = follow(model, kept, prompt.tokens, rest, len(answer) - len(logits))
                            logits = torch.cat([logits, later])
                        rows.append(
                            {"task": context["task"], "context": number, "question": asked}
                            | {"protocol": protocol, "press": name, "budget": budget, "prompt_tokens": prompt.tokens}
                            | {"kept_fraction": kept.kept_fraction(prompt.tokens), "one_by_one": one_by_one}
                            | {"bytes": kept.bytes_held(), "bytes_full": dense_bytes}
                            | mark(logits, answer)
                        )
                    progress.update()
            yield rows


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over cases: one row for each task, protocol, press and budget."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    names = ("task", "protocol", "press", "budget")
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    summary = []
    for key, group in groups.items():
        # The first token of an answer costs a press nothing where the question was read densely.
        later = [row for row in group if len(row["correct"]) > 1]
        summary.append(
            dict(zip(names, key, strict=True))
            | {"cases": len(group), "exact_match": statistics.mean(row["exact"] for row in group)}
            | {name: statistics.mean(row[name] for row in group) for name in ("token_accuracy", "log_likelihood")}
            | {
                "log_likelihood_after_first": statistics.mean(
                    statistics.mean(row["log_likelihoods"][1:]) for row in later
                )
                if later
                else None,
                "kept_fraction": statistics.mean(row["kept_fraction"] for row in group),
                "bytes": statistics.mean(row["bytes"] for row in group),
                "bytes_fraction": statistics.mean(row["bytes"] / row["bytes_full"] for row in group),
                "read_one_by_one": sum(row["one_by_one"] for row in group),
            }
        )
    return summary


@torch.no_grad()
def check(
    model: PreTrainedModel, context: dict[str, Any], protocol: str, settings: Sequence[Setting]
) -> list[dict[str, Any]]:
    """Compare what one dense reading gives each press with kvpress's own `with press(model)`.

    Args:
        model: Language model.
        context: Context with questions, of which the first is asked.
        protocol: One of `PROTOCOLS`.
        settings: Presses and budgets.

    Returns:
        For each setting the largest difference of keys or values in any layer, and the share of kept keys in common;
        of masked keys where the press masks.
        ObservedAttention's probabilities come from eager attention there, and round differently.
    """
    ids, dense = context["ids"], read(model, context["ids"])
    if protocol == "question":
        ids, dense = [*ids, *context["questions"][0]["ids"]], read(model, context["questions"][0]["ids"], before=dense)
    shared = compress(model, dense, settings)
    rows = []
    for name, budget in settings:
        if (name, budget) not in shared:
            continue
        mine, theirs = shared[name, budget], DynamicCache()
        press = PRESSES[name](1 - budget)
        model.set_attn_implementation("eager" if isinstance(press, ObservedAttentionPress) else "sdpa")
        with press(model):
            model.model(input_ids=torch.tensor([ids], device=model.device), past_key_values=theirs)
        difference, common, total = 0.0, 0, 0
        for i, (module, layer) in enumerate(zip(attention_layers(model), theirs.layers, strict=True)):
            mask = getattr(module, "masked_key_indices", None)
            module.masked_key_indices = None
            if mask is not None:  # masked keys: compare which, as sets
                own, other = (
                    set(zip(*(x.tolist() for x in indices), strict=True)) for indices in (mine.masked[i], mask)
                )
                common, total = common + len(own & other), total + len(other)
            else:
                # Eager and fused attention round differently, so a kept key is the same if it is near.
                distance = torch.cdist(
                    mine.keys[i][0].float(), layer.keys[0].float(), compute_mode="donot_use_mm_for_euclid_dist"
                ).amin(-1)  # (kv_heads, kept)
                common, total = common + int((distance < 1e-2).sum()), total + distance.numel()
            if layer.keys.shape == mine.keys[i].shape:
                difference = max(difference, float((layer.keys - mine.keys[i]).abs().max()))
                difference = max(difference, float((layer.values - mine.values[i]).abs().max()))
        model.set_attn_implementation("sdpa")
        rows.append(
            {"protocol": protocol, "press": name, "budget": budget, "prompt_tokens": len(ids)}
            | {"largest_difference": difference, "kept_in_common": common / total}
        )
    return rows


def describe(press: BasePress) -> dict[str, Any]:
    """Class and hyper-parameters of a press, of the one that it wraps too; not the ratio, which is the budget's."""
    described: dict[str, Any] = {"class": type(press).__name__}
    for name in inspect.signature(type(press)).parameters:
        value = getattr(press, name)
        if name != "compression_ratio":
            described[name] = describe(value) if isinstance(value, BasePress) else value
    return described


def print_table(summary: Sequence[dict[str, Any]]) -> None:
    """Print the means, best first within a task, protocol and budget."""
    print(
        f"{'task':<22}{'protocol':<10}{'budget':>6}  {'press':<22}{'exact':>7}{'tokens':>8}{'loglik':>8}{'bytes':>7}"
    )
    order = sorted(summary, key=lambda row: (row["task"], row["protocol"], -row["budget"], -row["log_likelihood"]))
    for row in order:
        print(
            f"{row['task']:<22}{row['protocol']:<10}{row['budget']:>6}  {row['press']:<22}{row['exact_match']:>7.3f}"
            f"{row['token_accuracy']:>8.3f}{row['log_likelihood']:>8.3f}{row['bytes_fraction']:>7.3f}"
        )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Path, required=True, help="JSON file of cases, as token ids")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model, with config and safetensors")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[0.5, 0.25, 0.1], help="fractions of tokens to keep"
    )
    parser.add_argument("--presses", nargs="+", choices=PRESSES, default=list(PRESSES), metavar="PRESS")
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS), metavar="PROTOCOL")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks to run; all by default")
    parser.add_argument("--limit", type=int, metavar="CONTEXTS", help="read this many contexts of each task at most")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--every-case", action="store_true", help="write every case as well, some megabytes")
    parser.add_argument(
        "--check", action="store_true", help="compare with kvpress's own hooks on two contexts, and stop"
    )
    return parser.parse_args()


def chosen_contexts(path: Path, tasks: Sequence[str] | None, limit: int | None) -> list[dict[str, Any]]:
    """Contexts of a cases file, by task, up to a limit for each."""
    contexts = json.loads(path.read_text())["contexts"]
    known = list(dict.fromkeys(context["task"] for context in contexts))
    if tasks and not set(tasks) <= set(known):
        raise SystemExit(f"{path} has the tasks {', '.join(known)}, not {', '.join(sorted(set(tasks) - set(known)))}")
    chosen = []
    for task in tasks or known:
        chosen += [context for context in contexts if context["task"] == task][:limit]
    return chosen


def main() -> None:
    """Run the presses over the cases, print a table and write it to a file."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    logging.getLogger("kvpress.presses.kvzip_press").setLevel(logging.ERROR)  # it warns that it is slow, each time
    contexts = chosen_contexts(arguments.cases, arguments.tasks, arguments.limit)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype), attn_implementation="sdpa"
    )
    model.to(arguments.device).eval()
    settings = [(name, budget) for name in arguments.presses for budget in arguments.budgets]
    report: dict[str, Any] = {
        "versions": {name: version(name) for name in ("kvpress", "torch", "transformers")}
        | {"python": platform.python_version()},
        "model": arguments.model.name,
        "dtype": arguments.dtype,
        "device": arguments.device,
        "threads": arguments.threads,
        "presses": {name: describe(PRESSES[name](0.5)) for name in arguments.presses},
    }
    start = time.perf_counter()
    if arguments.check:
        report["check"] = []
        for context in contexts[:2]:
            for protocol in arguments.protocols:
                rows = check(model, context, protocol, settings)
                report["check"] += rows
                print(*rows, sep="\n", flush=True)
    else:
        rows: list[dict[str, Any]] = []
        for more in measure(model, contexts, arguments.protocols, settings):
            rows += more
            report |= {"seconds": time.perf_counter() - start, "summary": summarise(rows)}
            if arguments.every_case:
                report["cases"] = rows
            arguments.out.write_text(json.dumps(report, indent=1))  # a run of an hour may be stopped half-way
        print_table(report["summary"])
    report["seconds"] = time.perf_counter() - start
    arguments.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
