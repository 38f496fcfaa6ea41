"""Figures of the scores that layers add up while they run: by position, and over the steps of an answer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, LogitsProcessor

from pyramid_cache.engine.layer import CompressedLayer
from pyramid_cache.plot.arguments import as_layer, as_row, compressed_layers, require_filled
from pyramid_cache.plot.figure import COLORS, draw_map, new_figure, position_label, tidy


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A map of scores spans this many powers of ten below the largest score.
MAP_DECADES = 5


def plot_scores(cache: Cache, layer_idx: int, row: int = 0) -> "Figure":
    """
    Draws the scores of a row's tokens in one layer, by position: the mean over the KV heads that hold the token, and
    the range where they differ.

    A layer adds up scores while it runs. Those of `H2OCache` are the attention so far. Caches with a window have the
    mean attention of the window, and `PyramidCache` that of the recent window to generated tokens which are not judged
    yet.

    Args:
        cache (`Cache`): A cache of this library that a model has run with.
        layer_idx (`int`): The layer of the model.
        row (`int`, defaults to 0): The row of the batch.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: The cache is not of this library, has no scores (yet), or has no such layer or row.
        RuntimeError: The last forward pass broke off.
    """
    require_filled(cache)
    layer, row = as_layer(layer_idx, cache), as_row(row, cache.batch_size)
    label = label_of_scores(cache, layer)
    by_head = scores_by_position(layer, row)
    if by_head.isnan().all():
        raise ValueError(why_no_scores(cache, layer_idx, row))
    scored = (~by_head.isnan()).any(dim=0).nonzero().flatten()
    means = by_head[:, scored].nanmean(dim=0)
    low = by_head[:, scored].nan_to_num(nan=torch.inf).amin(dim=0)
    high = by_head[:, scored].nan_to_num(nan=-torch.inf).amax(dim=0)
    positions = scored.tolist()
    figure = new_figure(3.5)
    axes = figure.subplots()
    if (low < high).any():
        axes.vlines(positions, low.tolist(), high.tolist(), color=COLORS[4], linewidth=1, label="range over KV heads")
    axes.plot(positions, means.tolist(), ".", color=COLORS[0], markersize=3, label="mean over KV heads")
    # Linear below the least mean, so that a score of 0 has a place on the axis.
    axes.set_yscale("symlog", linthresh=min(means[means > 0].tolist(), default=1.0))
    margin = max(by_head.shape[1] / 100, 1)
    axes.set(xlabel="position", xlim=(-margin, by_head.shape[1] - 1 + margin), ylabel=label, ylim=(0, None))
    axes.legend(frameon=False, fontsize="small", ncols=2)
    tidy(axes)
    of_row = f", row {row}" if cache.batch_size > 1 else ""
    axes.set_title(f"{type(cache).__name__}: scores of layer {layer_idx}{of_row}")
    return figure


def label_of_scores(cache: Cache, layer: CompressedLayer) -> str:
    """What the scores of a layer are, in two lines; raises ValueError if the layer has none."""
    if layer.score_label is None:
        raise ValueError(
            f"{type(cache).__name__} adds up no scores: what it keeps is decided by positions, or anew from the keys "
            "and values whenever tokens go. `plot_kept_positions` draws what that was."
        )
    return layer.score_label.replace(" (", "\n(")


def why_no_scores(cache: Cache, layer_idx: int, row: int) -> str:
    """The error message if nothing has been scored."""
    return (
        f"Layer {layer_idx} of the {type(cache).__name__} has scored no token of row {row} that it holds: with a "
        "budget of 1.0 nothing is scored. Lower the budget."
    )


def scores_by_position(layer: CompressedLayer, row: int) -> torch.Tensor:
    """`(kv_heads, positions)` float32, on the CPU: the scores of a row's tokens, NaN for those without one."""
    positions, scores = layer.held_positions()[row].cpu(), layer.held_scores()
    result = torch.full((positions.shape[0], layer.num_seen_per_row[row] + 1), torch.nan, device="cpu")
    if scores is not None:
        # The scores of empty slots go to one more column, which is dropped.
        result.scatter_(1, positions.masked_fill(positions < 0, result.shape[1] - 1), scores[row].cpu())
    return result[:, :-1]


class ScoreRecorder(LogitsProcessor):
    """
    Records the scores of some layers after each forward pass of `generate`, whose answer does not change. On an
    accelerator each record waits for the device.

    Args:
        cache (`Cache`): A cache of this library that adds up scores (see `plot_scores`).
        layer_indices (`Sequence[int]`, *optional*): The layers of the model to record. By default the first, the
            middle and the last of those that evict. Each takes 4 bytes per token seen, for each forward pass.
        row (`int`, defaults to 0): The row of the batch. In a beam search, whichever beam is in that row.

    Raises:
        ValueError: The cache is not of this library, adds up no scores, or has no such layer.

    Attributes:
        num_seen (`list[int]`): The number of tokens that the row had seen, after each forward pass.
        scores (`dict[int, list[torch.Tensor]]`): For each layer and forward pass `(positions,)` float32: the mean over
            the KV heads that hold a position, NaN where none does.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import H2OCache
    >>> from pyramid_cache.plot import ScoreRecorder
    >>> import torch

    >>> config = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
    >>> model = LlamaForCausalLM(config)
    >>> cache = H2OCache(model, budget=16)
    >>> recorder = ScoreRecorder(cache)
    >>> settings = {"max_new_tokens": 8, "eos_token_id": None, "logits_processor": [recorder]}
    >>> tokens = model.generate(torch.arange(40)[None], past_key_values=cache, **settings)
    >>> recorder.num_seen
    [40, 41, 42, 43, 44, 45, 46, 47]
    >>> figure = recorder.plot()

    ```
    """

    def __init__(self, cache: Cache, layer_indices: Sequence[int] | None = None, row: int = 0) -> None:
        layers = [layer.place.layer_idx for layer in compressed_layers(cache)]
        if layer_indices is None:
            layer_indices = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
        if isinstance(layer_indices, (int, str)) or not len(layer_indices):
            raise ValueError(f"`layer_indices={layer_indices!r}` must be a list of layers to record, one at least.")
        for layer_idx in layer_indices:
            label_of_scores(cache, as_layer(layer_idx, cache))
        self.cache: Any = cache
        self.row = row
        self.num_seen: list[int] = []
        self.scores: dict[int, list[torch.Tensor]] = {layer_idx: [] for layer_idx in layer_indices}

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        # Prompt lookup asks for the next tokens of its guesses before the model has read anything.
        if self.cache.get_seq_length():
            self.record()
        return scores

    @torch.no_grad()
    def record(self) -> None:
        """
        Records what the layers hold, for a decoding loop of your own. A second call without a new token does nothing.

        Raises:
            ValueError: The cache holds nothing yet, or has no such row.
        """
        require_filled(self.cache)
        row = as_row(self.row, self.cache.batch_size)
        num_seen = self.cache.layers[next(iter(self.scores))].num_seen_per_row[row]
        if self.num_seen and self.num_seen[-1] == num_seen:
            return
        self.num_seen.append(num_seen)
        for layer_idx, records in self.scores.items():
            records.append(scores_by_position(self.cache.layers[layer_idx], row).nanmean(dim=0))

    def table(self, layer_idx: int) -> torch.Tensor:
        """
        The scores of a layer over time.

        Returns:
            `torch.Tensor`: `(forward passes, positions)` float32, NaN for tokens without a score: they are to come,
                are gone, or are not scored by the method.

        Raises:
            ValueError: Nothing, or not this layer, has been recorded.
        """
        if layer_idx not in self.scores:
            raise ValueError(f"Layer {layer_idx!r} was not recorded, but {list(self.scores)} were.")
        if not self.num_seen:
            raise ValueError(
                "Nothing has been recorded yet: pass `logits_processor=[recorder]` to `generate`, or call "
                "`recorder.record()` after each forward pass."
            )
        result = torch.full((len(self.num_seen), max(self.num_seen)), torch.nan, device="cpu")
        for index, scores in enumerate(self.scores[layer_idx]):
            result[index, : scores.shape[0]] = scores
        return result

    def plot(self) -> "Figure":
        """
        Draws a map for each recorded layer: positions from left to right, forward passes from top to bottom. Tokens
        without a score (see `table`) are white. The colours span five powers of ten; a score of 0 has the lowest.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: Nothing has been recorded, or no token was scored.
        """
        tables = {layer_idx: self.table(layer_idx) for layer_idx in self.scores}
        first = next(iter(tables))
        if all(table.isnan().all() for table in tables.values()):
            raise ValueError(why_no_scores(self.cache, first, self.row))
        figure = new_figure(0.8 + 2.2 * len(tables))
        from matplotlib.colors import LogNorm

        largest = max(table.nan_to_num(nan=0.0).max().item() for table in tables.values()) or 1.0
        axes = figure.subplots(len(tables), 1, sharex=True, squeeze=False)[:, 0]
        for layer_axes, (layer_idx, table) in zip(axes, tables.items(), strict=True):
            norm = LogNorm(largest * 10**-MAP_DECADES, largest, clip=True)
            image = draw_map(layer_axes, table, cmap="viridis", bad="white", norm=norm)
            layer_axes.set(title=f"layer {layer_idx}", ylabel="forward pass")
        label = label_of_scores(self.cache, self.cache.layers[first])
        figure.colorbar(image, ax=axes.tolist(), label=label, extend="min")
        axes[-1].set_xlabel(position_label(max(self.num_seen)))
        figure.suptitle(f"{type(self.cache).__name__}: scores after each forward pass (0: the first one)")
        return figure
