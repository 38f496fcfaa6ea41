"""Figures of the scores that layers add up while they run: by position, and over the steps of an answer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import Cache, LogitsProcessor

from pyramid_cache.engine.layer import CompressedLayer
from pyramid_cache.plot.arguments import as_layer, as_row, compressed_layers, require_filled
from pyramid_cache.plot.figure import COLORS, draw_map, new_figure, position_label, tidy


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# How many powers of ten a map of scores spans below its largest.
MAP_DECADES = 5


def plot_scores(cache: Cache, layer_idx: int, row: int = 0) -> "Figure":
    """
    Draws the scores that a layer holds of a row's tokens, by position: the mean over KV heads that hold the token, and the
    range where they differ.

    These are what layers add up while they run: `H2OCache` the attention so far, caches that look at a window its mean
    attention, `PyramidCache` that of the recent window to generated tokens which are not judged yet.

    Args:
        cache (`Cache`): One of this library that a model has run with.
        layer_idx (`int`): Which layer of the model.
        row (`int`, defaults to 0): Of the batch.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: It is no cache of this library, adds up no scores, has none of that row yet, or has no such layer or row.
        RuntimeError: The last forward pass broke off.
    """
    require_filled(cache)
    layer, row = as_layer(layer_idx, cache), as_row(row, cache.batch_size)
    label = label_of_scores(cache, layer)
    by_head = scores_by_position(layer, row)
    if by_head.isnan().all():
        raise ValueError(why_no_scores(cache, layer_idx, row))
    figure = new_figure(9, 3.5)
    axes = figure.subplots()
    draw_scores(axes, by_head)
    of_row = f", row {row}" if cache.batch_size > 1 else ""
    axes.set(title=f"{type(cache).__name__}: scores of layer {layer_idx}{of_row}", ylabel=label)
    return figure


def label_of_scores(cache: Cache, layer: CompressedLayer) -> str:
    """What the scores of a layer are, broken in two lines; raises ValueError if it has none."""
    if layer.score_label is None:
        raise ValueError(
            f"{type(cache).__name__} adds up no scores: what it keeps is decided by positions, or anew from the keys and values "
            "whenever tokens go. `plot_kept_positions` draws what that was."
        )
    return layer.score_label.replace(" (", "\n(")


def why_no_scores(cache: Cache, layer_idx: int, row: int) -> str:
    """What to say if nothing has been scored."""
    return (
        f"Layer {layer_idx} of the {type(cache).__name__} has scored no token of row {row} that it holds: with a budget of 1.0 "
        "nothing is scored, and by PyramidCache generated tokens alone, as long as they are not judged. Generate more, or lower "
        "the budget."
    )


def scores_by_position(layer: CompressedLayer, row: int) -> torch.Tensor:
    """`(kv_heads, positions)` float32, on the CPU: the scores of a row's tokens, NaN for those without one."""
    positions, scores = layer.held_positions()[row].cpu(), layer.held_scores()
    result = torch.full((positions.shape[0], layer.num_seen_per_row[row] + 1), torch.nan)
    if scores is not None:
        # One place more, for empty slots.
        result.scatter_(1, positions.masked_fill(positions < 0, result.shape[1] - 1), scores[row].cpu())
    return result[:, :-1]


def mean_of_heads(by_head: torch.Tensor) -> torch.Tensor:
    """`(positions,)`: the mean over the heads that hold a position, NaN where none does."""
    return by_head.nanmean(dim=0)


def draw_scores(axes: "Axes", by_head: torch.Tensor) -> None:
    """Points over positions, with lines from the lowest to the highest KV head."""
    means = mean_of_heads(by_head)
    scored = (~means.isnan()).nonzero().flatten()
    low = by_head.nan_to_num(nan=torch.inf).amin(dim=0)
    high = by_head.nan_to_num(nan=-torch.inf).amax(dim=0)
    if (low < high)[scored].any():
        axes.vlines(
            scored.tolist(),
            low[scored].tolist(),
            high[scored].tolist(),
            color=COLORS[4],
            linewidth=1,
            label="range over KV heads",
        )
    axes.plot(scored.tolist(), means[scored].tolist(), ".", color=COLORS[0], markersize=3, label="mean over KV heads")
    least = means[means > 0].min().item() if (means > 0).any() else 1.0
    # Linear below the least mean, so that a score of 0 has a place on the axis.
    axes.set_yscale("symlog", linthresh=least)
    margin = max(by_head.shape[1] / 100, 1)
    axes.set(xlabel="position", xlim=(-margin, by_head.shape[1] - 1 + margin), ylim=(0, None))
    axes.legend(frameon=False, fontsize="small", ncols=2)
    tidy(axes)


class ScoreRecorder(LogitsProcessor):
    """
    Records the scores of some layers after each forward pass of `generate`, which it leaves as it is. On an accelerator it
    waits for the device at each of them.

    Args:
        cache (`Cache`): One of this library that adds up scores (see `plot_scores`).
        layer_indices (`Sequence[int]`, *optional*): Which layers of the model. By default the first, the middle and the last
            of those that evict. Each takes 4 bytes per token seen, for each forward pass.
        row (`int`, defaults to 0): Of the batch. Of a beam search, whichever beam is in that row.

    Raises:
        ValueError: It is no cache of this library, adds up no scores, or has no such layer.

    Attributes:
        num_seen (`list[int]`): The tokens that the row had seen after each forward pass.
        scores (`dict[int, list[torch.Tensor]]`): By layer, after each forward pass the mean over the KV heads that hold a
            position, `(positions,)` float32, NaN where none does.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import H2OCache
    >>> from pyramid_cache.plot import ScoreRecorder
    >>> import torch

    >>> config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
    >>> model = LlamaForCausalLM(config)
    >>> cache = H2OCache(model, budget=16)
    >>> recorder = ScoreRecorder(cache)
    >>> tokens = model.generate(
    ...     torch.arange(40)[None],
    ...     past_key_values=cache,
    ...     max_new_tokens=8,
    ...     logits_processor=[recorder],
    ...     eos_token_id=None,
    ... )
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
            raise ValueError(
                f"`layer_indices={layer_indices!r}` must be a list of the layers to record, one at least."
            )
        for layer_idx in layer_indices:
            label_of_scores(cache, as_layer(layer_idx, cache))
        self.cache = cache
        self.row = row
        self.num_seen: list[int] = []
        self.scores: dict[int, list[torch.Tensor]] = {layer_idx: [] for layer_idx in layer_indices}

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        # Those who guess ask for the next tokens of their guesses before anything has been read.
        if self.cache.get_seq_length():
            self.record()
        return scores

    @torch.no_grad()
    def record(self) -> None:
        """
        Records what the layers hold now, for loops of one's own; nothing if the cache has seen no token since.

        Raises:
            ValueError: The cache holds nothing yet, or has no such row.
        """
        require_filled(self.cache)
        row = as_row(self.row, self.cache.batch_size)
        layers = {layer_idx: self.cache.layers[layer_idx] for layer_idx in self.scores}
        num_seen = next(iter(layers.values())).num_seen_per_row[row]
        if self.num_seen and self.num_seen[-1] == num_seen:
            return
        self.num_seen.append(num_seen)
        for layer_idx, layer in layers.items():
            self.scores[layer_idx].append(mean_of_heads(scores_by_position(layer, row)))

    def table(self, layer_idx: int) -> torch.Tensor:
        """
        The scores of a layer over time.

        Returns:
            `torch.Tensor`: `(forward passes, positions)` float32, NaN for tokens without a score: those to come, those that
                are gone, and those that the method does not score.

        Raises:
            ValueError: Nothing has been recorded, or not of that layer.
        """
        if layer_idx not in self.scores:
            raise ValueError(f"Layer {layer_idx!r} was not recorded, but {list(self.scores)} were.")
        if not self.num_seen:
            raise ValueError(
                "Nothing has been recorded yet: pass `logits_processor=[recorder]` to `generate`, or call `recorder.record()` "
                "after each forward pass."
            )
        result = torch.full((len(self.num_seen), max(self.num_seen)), torch.nan)
        for index, scores in enumerate(self.scores[layer_idx]):
            result[index, : scores.shape[0]] = scores
        return result

    def plot(self) -> "Figure":
        """
        Draws a map for each layer that was recorded: positions from left to right, forward passes from top to bottom. Tokens
        without a score are white: they have gone, are to come, or are not scored. The colours span five powers of ten.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: Nothing has been recorded, or no token was scored.
        """
        tables = {layer_idx: self.table(layer_idx) for layer_idx in self.scores}
        if all(table.isnan().all() for table in tables.values()):
            raise ValueError(why_no_scores(self.cache, next(iter(tables)), self.row))
        figure = new_figure(9, 0.8 + 2.2 * len(tables))
        axes = figure.subplots(len(tables), 1, sharex=True, squeeze=False)[:, 0]
        largest = max(table.nan_to_num(nan=0.0).max().item() for table in tables.values()) or 1.0
        for layer_axes, (layer_idx, table) in zip(axes, tables.items(), strict=True):
            image = draw_over_time(layer_axes, table, largest)
            layer_axes.set_title(f"layer {layer_idx}")
        label = label_of_scores(self.cache, self.cache.layers[next(iter(tables))])
        figure.colorbar(image, ax=axes.tolist(), label=label, extend="min")
        axes[-1].set_xlabel(position_label(max(self.num_seen)))
        figure.suptitle(f"{type(self.cache).__name__}: scores after each forward pass (0: the first one)")
        return figure


def draw_over_time(axes: "Axes", table: torch.Tensor, largest: float) -> "AxesImage":
    """
    A map of scores `(forward passes, positions)` on a logarithmic scale up to `largest`; a score of 0 has the lowest colour.
    """
    from matplotlib.colors import LogNorm

    image = draw_map(
        axes,
        table,
        cmap="viridis",
        bad="white",
        norm=LogNorm(largest * 10**-MAP_DECADES, largest, clip=True),
    )
    axes.set_ylabel("forward pass")
    return image
