"""A model reads texts, and each layer tells which tokens are massive and where its last queries look."""

import statistics
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyramid_cache.caches.massive_activation import detection as massive
from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.engine.attention import AttentionCall
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.engine.held import LayerPlace
from pyramid_cache.engine.layer import CompressedLayer
from pyramid_cache.engine.scoring import attend_and_score
from pyramid_cache.engine.store import SlotStore
from pyramid_cache.engine.tokens import MaskReader, Tokens
from pyramid_cache.lab.profile.spread import AttentionSpread, attention_spread, layer_class


# The definition of Sun et al., Section 2, with their second number: beyond 100, and 1,000 times the median.
LEAST_MAGNITUDE = 100.0
LEAST_RATIO = 1000.0
# Magnitudes per layer that are kept for the plot: the paper's figures show as many.
NUM_LARGEST = 3


class ProfilingLayer(CompressedLayer):
    """Holds everything, and notes which tokens look massive and what the last queries attended to."""

    def __init__(self, place: LayerPlace, masks: MaskReader, num_queries: int) -> None:
        self.num_queries = num_queries
        self.found: massive.MassiveTokens | None = None
        self.attention: torch.Tensor | None = None
        super().__init__(place, masks, SlotStore())

    def num_tokens_to_keep(self, row_length: int) -> int:
        return max(row_length, 1)

    def attend_prompt(self, call: AttentionCall, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        rotary = self.rotary_of(call.module)
        longest = max(tokens.row_lengths)
        self.found, _ = massive.massive_in_keys_and_values(call.key, call.value, tokens.positions, rotary, longest)
        output, self.attention = attend_and_score(call, tokens, min(self.num_queries, call.num_queries))
        return output

    def attend_step(self, call: AttentionCall, longest: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return call.run()


@dataclass(frozen=True)
class OutputFindings:
    """The output of one decoder layer for one text."""

    median: float  # of all magnitudes
    largest: list[float]  # magnitudes of different tokens
    entries: list[tuple[int, int, float]]  # massive activations: position, dimension and value

    @property
    def positions(self) -> set[int]:
        return {position for position, _, _ in self.entries}


@dataclass(frozen=True)
class LayerFindings:
    """The attention of one layer for one text."""

    found: set[int]  # positions that look massive to keys and values
    spread: AttentionSpread


@dataclass(frozen=True)
class TextFindings:
    """Everything that was measured with one text."""

    tokens: dict[int, str]  # the massive tokens as text, by position
    outputs: list[OutputFindings]  # one per decoder layer
    layers: dict[int, LayerFindings]  # the layers with full attention, by index


def measure_output(hidden_states: torch.Tensor) -> OutputFindings:
    """The findings in hidden states, `(1, tokens, hidden_size)`."""
    states = hidden_states[0].detach().float()
    magnitudes = states.abs()
    median = magnitudes.median()
    largest = magnitudes.amax(dim=-1).topk(min(NUM_LARGEST, states.shape[0])).values
    is_massive = (magnitudes > LEAST_MAGNITUDE) & (magnitudes >= LEAST_RATIO * median)
    entries = [(*place, states[tuple(place)].item()) for place in is_massive.nonzero().tolist()]
    return OutputFindings(median.item(), largest.tolist(), entries)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """
    The decoder layers of a model, by whatever name.

    Raises:
        NotImplementedError: There is no list of as many as the config says.
    """
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    for child in model.get_decoder().children():
        if isinstance(child, nn.ModuleList) and len(child) == depth:
            return child
    raise NotImplementedError(f"{type(model).__name__} has no list of {depth} decoder layers to look at.")


@torch.no_grad()
def measure_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token_ids: torch.Tensor, window_size: int
) -> TextFindings:
    """Reads one text, `(1, tokens)`. The window is that of the last queries, and the tokens that are local to them."""
    cache = CompressedCache(model.config, lambda place, masks: ProfilingLayer(place, masks, window_size))
    outputs: list[OutputFindings] = []

    def note(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
        outputs.append(measure_output(output[0] if isinstance(output, tuple) else output))

    with ExitStack() as hooks:
        for layer in decoder_layers(model):
            hooks.callback(layer.register_forward_hook(note).remove)
        model(input_ids=token_ids.to(model.device), **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
    num_tokens = token_ids.shape[1]
    exact = sorted(set().union(*(output.positions for output in outputs)))
    layers = {}
    for layer in cache.compressed_layers:
        found = {position for position in layer.found.positions[0].tolist() if position >= 0}
        is_massive = torch.zeros(num_tokens, dtype=torch.bool, device=layer.device)
        is_massive[sorted(found.union(exact) or range(massive.NUM_FIRST_TOKENS))] = True
        spread = attention_spread(layer.attention[0], is_massive, window_size)
        layers[layer.place.layer_idx] = LayerFindings(found, spread)
    tokens = {position: str(tokenizer.decode([int(token_ids[0, position])])) for position in exact}
    return TextFindings(tokens, outputs, layers)


def cut_texts(tokenizer: PreTrainedTokenizerBase, text: str, num_tokens: int, num_texts: int) -> list[torch.Tensor]:
    """Evenly spread stretches `(1, num_tokens)` of a text behind its first token; a ValueError if it is too short."""
    beginning = tokenizer("a")["input_ids"]
    start_ids = beginning[:1] if beginning and beginning[0] == tokenizer.bos_token_id else []
    token_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    length = num_tokens - len(start_ids)
    if length < 1 or length > len(token_ids):
        problem = f"--tokens {num_tokens}: the text has {len(token_ids)} tokens"
        raise ValueError(f"{problem}. Give fewer, or a longer --text.")
    starts = [index * (len(token_ids) - length) // max(num_texts - 1, 1) for index in range(num_texts)]
    return [torch.tensor([start_ids + token_ids[start : start + length]]) for start in starts]


def summarize_layers(findings: list[TextFindings]) -> list[dict[str, Any]]:
    """Means over texts by layer. Keys and values are compared with their source, the output of the layer before."""
    rows = []
    for index in findings[0].layers:
        layers = [text.layers[index] for text in findings]
        exact = [text.outputs[index - 1].positions if index else set() for text in findings]
        num_exact, num_found = sum(map(len, exact)), sum(len(layer.found) for layer in layers)
        num_both = sum(len(layer.found & positions) for layer, positions in zip(layers, exact, strict=True))
        num_either = num_exact + num_found - num_both
        names = ("sink_share", "local_share", "support")
        shares = {name: statistics.mean(getattr(layer.spread, name) for layer in layers) for name in names}
        rows.append(
            {
                "layer": index,
                **shares,
                "kind": layer_class(shares["support"], shares["local_share"]),
                "num_by_hidden_states": num_exact,
                "num_by_keys_and_values": num_found,
                "num_by_both": num_both,
                "agreement": num_both / num_either if num_either else None,
            }
        )
    return rows


def summarize_outputs(findings: list[TextFindings]) -> list[dict[str, Any]]:
    """One record for each decoder layer's output, means over the texts."""
    return [
        {
            "layer": index,
            "median": statistics.mean(output.median for output in outputs),
            "largest": [statistics.mean(each) for each in zip(*(output.largest for output in outputs), strict=True)],
            "num_massive_tokens": sum(len(output.positions) for output in outputs),
        }
        for index, outputs in enumerate(zip(*(text.outputs for text in findings), strict=True))
    ]


def summarize_massive(findings: list[TextFindings]) -> dict[str, Any]:
    """Which dimensions and tokens are massive, how much, and from which layer's output to which, over all texts."""
    by_dimension, by_token = defaultdict(list), defaultdict(list)
    for text_index, text in enumerate(findings):
        for layer, output in enumerate(text.outputs):
            for position, dimension, value in output.entries:
                token = (text_index, position)
                by_dimension[dimension].append((token, layer, value))
                by_token[token].append((dimension, layer, value))
    dimensions = [
        {"dimension": dimension, "num_tokens": len({token for token, _, _ in own}), **extent(own)}
        for dimension, own in sorted(by_dimension.items())
    ]
    tokens = [
        {
            "text": text,
            "position": position,
            "token": findings[text].tokens[position],
            "dimensions": sorted({dimension for dimension, _, _ in own}),
            **extent(own),
        }
        for (text, position), own in sorted(by_token.items())
    ]
    layers = [row[name] for row in tokens for name in ("first_layer", "last_layer")]
    return {
        "layers": [min(layers), max(layers)] if layers else None,
        "dimensions": sorted(dimensions, key=lambda row: -abs(row["largest"])),
        "tokens": tokens,
    }


def extent(entries: list[tuple[Any, int, float]]) -> dict[str, Any]:
    """The value of largest magnitude, and the first and the last layer; entries end with layer and value."""
    _, layers, values = zip(*entries, strict=True)
    return {"largest": max(values, key=abs), "first_layer": min(layers), "last_layer": max(layers)}
