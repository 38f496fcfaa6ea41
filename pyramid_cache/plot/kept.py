"""Figures of how many tokens layers hold, and which."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import Cache

from pyramid_cache.engine.kept import budgets, kept_positions, latest_tokens, num_held_by_head
from pyramid_cache.engine.layer import CompressedLayer
from pyramid_cache.plot.arguments import as_row, compressed_layers, require_filled
from pyramid_cache.plot.figure import (
    COLORS,
    LINE_STYLES,
    MARKERS,
    OTHER_LAYERS_COLOR,
    draw_map,
    new_figure,
    position_label,
    tidy,
)


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_cache(cache: Cache, row: int = 0) -> "Figure":
    """`plot_kept_tokens` above `plot_kept_positions`; see `CompressedCache.plot`."""
    require_filled(cache)
    row = as_row(row, cache.batch_size)
    figure = new_figure(9, 6)
    tokens, positions = figure.subplots(2, 1, height_ratios=(2, 3))
    draw_kept_tokens(tokens, cache)
    draw_kept_positions(positions, cache, row)
    figure.suptitle(title_of(cache))
    return figure


def plot_kept_tokens(cache: Cache) -> "Figure":
    """
    Draws how many tokens each layer holds: the mean over rows and KV heads, and the range where they differ.

    Bars of layers that hybrid models keep from transformers are grey; those count the padding too. What a `ShadowKVCache`
    shows is its buffer, which is what a step attends to. The others are not lost.

    Args:
        cache (`Cache`): One of this library that a model has run with.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: It is no cache of this library, or holds nothing yet.
        RuntimeError: The last forward pass broke off.
    """
    require_filled(cache)
    figure = new_figure(9, 3)
    axes = figure.subplots()
    draw_kept_tokens(axes, cache)
    axes.set_title(title_of(cache))
    return figure


def plot_kept_positions(cache: Cache, row: int = 0) -> "Figure":
    """
    Draws which positions each layer holds, as the share of its KV heads that hold them. Positions are counted among the
    row's tokens, without padding. More than 1,024 are drawn as means of neighbours.

    Layers of hybrid models that hold no tokens one by one, as linear attention does, are grey. What a `ShadowKVCache` shows is
    its buffer, which is what a step attends to: the chosen chunks, the outliers and the latest tokens. The others are not lost.

    Args:
        cache (`Cache`): One of this library that a model has run with.
        row (`int`, defaults to 0): Of the batch.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: It is no cache of this library, holds nothing yet, or has no such row.
        RuntimeError: The last forward pass broke off.
    """
    require_filled(cache)
    row = as_row(row, cache.batch_size)
    figure = new_figure(9, 3.8)
    axes = figure.subplots()
    draw_kept_positions(axes, cache, row)
    axes.set_title(title_of(cache))
    return figure


def plot_budgets(*caches: Cache, labels: Sequence[str] | None = None, prompt_length: int | None = None) -> "Figure":
    """
    Draws how many tokens each layer of some caches may keep.

    Without a prompt's length that is of what the caches have seen: the mean over rows, without the tokens that wait for
    their eviction. What `PyramidCache` keeps of an answer comes on top. With a length, the caches need not have run.

    Args:
        caches (`Cache`): Of this library.
        labels (`Sequence[str]`, *optional*): What the legend calls them. By default their classes, with the settings in
            which those of one class differ.
        prompt_length (`int`, *optional*): In tokens.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: There is no cache, one is not of this library or has not run where it must have, or there are not as many
            labels as caches.
        RuntimeError: The last forward pass of one broke off.
    """
    if not caches:
        raise ValueError("`plot_budgets()`: give one cache at least.")
    if labels is not None and (isinstance(labels, str) or len(labels) != len(caches)):
        raise ValueError(f"`labels={labels!r}` must be a label for each of the {len(caches)} caches.")
    if prompt_length is not None and (
        isinstance(prompt_length, bool) or not isinstance(prompt_length, int) or prompt_length < 1
    ):
        raise ValueError(f"`prompt_length={prompt_length!r}` must be a positive number of tokens.")
    for cache in caches:
        if prompt_length is None:
            require_filled(cache)
        else:
            require_budgets_in_tokens(cache)
    figure = new_figure(9, 4)
    axes = figure.subplots()
    for index, (cache, label) in enumerate(zip(caches, labels or distinct_labels(caches), strict=True)):
        layers = compressed_layers(cache)
        # Lines that coincide take turns with their markers.
        num_layers = len(layers)
        axes.plot(
            [layer.place.layer_idx for layer in layers],
            budgets(layers, prompt_length),
            color=COLORS[index % len(COLORS)],
            linestyle=LINE_STYLES[index % len(LINE_STYLES)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4,
            markevery=(index % num_layers, min(len(caches), num_layers)),
            label=label,
        )
    of_what = "what they have seen" if prompt_length is None else f"a prompt of {prompt_length:,} tokens"
    axes.set(title=f"What layers may keep of {of_what}", xlabel="layer", ylabel="tokens per KV head", ylim=(0, None))
    axes.legend(frameon=False, fontsize="small")
    tidy(axes)
    return figure


def require_budgets_in_tokens(cache: Cache) -> None:
    """Raises ValueError for a budget in bytes of a cache that does not know yet how many tokens it comes to."""
    for layer in compressed_layers(cache):
        if layer.budget is not None and layer.token_budget is None:
            raise ValueError(
                f"How many tokens the {layer.budget.amount:,} bytes of the {type(cache).__name__} come to is known once it "
                "holds some: run the model with it first."
            )


def distinct_labels(caches: Sequence[Cache]) -> list[str]:
    """The classes of caches, with the settings in which those of one class differ."""
    labels = []
    for cache in caches:
        alike = [other.settings or {} for other in caches if type(other) is type(cache)]
        own = cache.settings or {}
        differing = [name for name in own if any(other.get(name) != own[name] for other in alike)]
        settings = ", ".join(f"{name}={own[name]!r}" for name in differing)
        labels.append(f"{type(cache).__name__}({settings})" if settings else type(cache).__name__)
    return labels


def title_of(cache: Cache) -> str:
    """What a figure of one cache is headed."""
    seen = longest_row(cache)
    lost = "" if loses_tokens(cache) else ", none of them lost"
    return f"{type(cache).__name__}: {seen:,} tokens seen{lost}"


def longest_row(cache: Cache) -> int:
    """How many tokens the longest row has seen."""
    return max(max(layer.num_seen_per_row) for layer in compressed_layers(cache))


def loses_tokens(cache: Cache) -> bool:
    """Whether what a layer does not hold is lost to it."""
    return all(layer.evicts for layer in compressed_layers(cache))


def draw_kept_tokens(axes: "Axes", cache: Cache) -> None:
    """Bars of tokens over layers."""
    own = compressed_layers(cache)
    held = [num_held_by_head(layer).float().cpu() for layer in own]
    layers = [layer.place.layer_idx for layer in own]
    means = torch.stack([numbers.mean() for numbers in held])
    held_label = "kept" if loses_tokens(cache) else "in the buffer"
    axes.bar(layers, means.tolist(), color=COLORS[0], label=f"{held_label}, mean over KV heads and rows")
    low, high = (torch.stack([getattr(numbers, name)() for numbers in held]) for name in ("amin", "amax"))
    if (low < high).any():
        ranged = (low < high).nonzero().flatten().tolist()
        axes.errorbar(
            [layers[index] for index in ranged],
            means[ranged].tolist(),
            yerr=torch.stack([means - low, high - means])[:, ranged].tolist(),
            fmt="none",
            ecolor="black",
            elinewidth=1,
            capsize=2,
            label="range over KV heads and rows",
        )
    others = [index for index, layer in enumerate(cache.layers) if not isinstance(layer, CompressedLayer)]
    if others:
        axes.bar(
            others,
            [latest_tokens(cache.layers[index]) for index in others],
            color=OTHER_LAYERS_COLOR,
            label="layers of transformers",
        )
    axes.axhline(longest_row(cache), color="black", linewidth=0.8, linestyle=":", label="tokens seen")
    # The room above what was seen is for the legend.
    axes.set(
        xlabel="layer", ylabel="tokens", xlim=(-0.7, len(cache.layers) - 0.3), ylim=(0, 1.25 * longest_row(cache))
    )
    axes.legend(frameon=False, fontsize="small", ncols=4, loc="upper center")
    tidy(axes)


def draw_kept_positions(axes: "Axes", cache: Cache, row: int) -> None:
    """A map of positions over layers."""
    num_positions = max(layer.num_seen_per_row[row] for layer in compressed_layers(cache))
    image = draw_map(axes, kept_positions(cache, num_positions, row), vmin=0, vmax=1)
    of_row = f" in row {row}" if cache.batch_size > 1 else ""
    axes.set(xlabel=position_label(num_positions) + of_row, ylabel="layer")
    hold = " that keep it" if loses_tokens(cache) else "\nthat have it in the buffer"
    axes.figure.colorbar(image, ax=axes, label=f"share of KV heads{hold}")
