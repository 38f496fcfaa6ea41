"""Figures of how many tokens layers hold, and which."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from transformers import Cache

from pyramid_cache.plot.arguments import as_row, compressed_layers, loses_tokens, require_filled, tokens_seen
from pyramid_cache.plot.figure import COLORS, OTHER_LAYERS_COLOR, draw_map, new_figure, position_label, tidy
from pyramid_cache.plot.held import budgets, kept_positions, latest_tokens, num_held_by_head


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE_STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX"


def plot_cache(cache: Cache, row: int = 0) -> "Figure":
    """`plot_kept_tokens` above `plot_kept_positions`; see `CompressedCache.plot`."""
    return draw(cache, row, 6, draw_kept_tokens, draw_kept_positions)


def plot_kept_tokens(cache: Cache) -> "Figure":
    """
    Draws how many tokens each layer holds: the mean over rows and KV heads, and the range where they differ.

    The layers that a hybrid model keeps from transformers have grey bars, which count padding too. For a
    `ShadowKVCache` the bars show its buffer, which is what a step attends to. The other tokens are not lost.

    Args:
        cache (`Cache`): A cache of this library that a model has run with.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: The cache is not of this library, or is empty.
        RuntimeError: The last forward pass broke off.
    """
    return draw(cache, 0, 3, draw_kept_tokens)


def plot_kept_positions(cache: Cache, row: int = 0) -> "Figure":
    """
    Draws which positions each layer holds, as the share of its KV heads that hold them. Positions are counted among
    the row's tokens, without padding. More than 1,024 are drawn as means of neighbours.

    Layers that hold no single tokens, such as linear attention in hybrid models, are grey. For a `ShadowKVCache` the
    map shows its buffer: the chosen chunks, the outliers and the latest tokens. The other tokens are not lost.

    Args:
        cache (`Cache`): A cache of this library that a model has run with.
        row (`int`, defaults to 0): The row of the batch.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: The cache is not of this library, is empty, or has no such row.
        RuntimeError: The last forward pass broke off.
    """
    return draw(cache, row, 3.8, draw_kept_positions)


def plot_budgets(*caches: Cache, labels: Sequence[str] | None = None, prompt_length: int | None = None) -> "Figure":
    """
    Draws how many tokens each layer of some caches may keep.

    Without `prompt_length`, the figure shows what they may keep of the tokens that they have seen: the mean over rows,
    without tokens that wait for eviction. What `PyramidCache` keeps of an answer comes on top. With `prompt_length`,
    the caches need not have run.

    Args:
        caches (`Cache`): Caches of this library.
        labels (`Sequence[str]`, *optional*): Their names in the legend. By default their classes, with the settings in
            which caches of one class differ.
        prompt_length (`int`, *optional*): In tokens.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: There is no cache, one is not of this library or must run first, or the number of labels is wrong.
        RuntimeError: The last forward pass of one broke off.
    """
    if not caches:
        raise ValueError("`plot_budgets()`: give one cache at least.")
    if labels is not None and (isinstance(labels, str) or len(labels) != len(caches)):
        raise ValueError(f"`labels={labels!r}` must be a label for each of the {len(caches)} caches.")
    if prompt_length is not None and (type(prompt_length) is not int or prompt_length < 1):
        raise ValueError(f"`prompt_length={prompt_length!r}` must be a positive number of tokens.")
    lines = []
    for cache in caches:
        layers = compressed_layers(cache)
        if prompt_length is None:
            require_filled(cache)
        elif any(layer.budget and layer.budget.kind == "bytes" and not layer.state.budget_tokens for layer in layers):
            raise ValueError(
                f"How many tokens the {layers[0].budget.amount:,} bytes of the {type(cache).__name__} come to is "
                "known once it holds some: run the model with it first."
            )
        lines.append(([layer.place.layer_idx for layer in layers], budgets(layers, prompt_length)))
    figure = new_figure(4)
    axes = figure.subplots()
    for index, ((depths, kept), label) in enumerate(zip(lines, labels or distinct_labels(caches), strict=True)):
        axes.plot(
            depths,
            kept,
            color=COLORS[index % len(COLORS)],
            linestyle=LINE_STYLES[index % len(LINE_STYLES)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4,
            # Lines that coincide take turns with their markers.
            markevery=(index % len(depths), min(len(caches), len(depths))),
            label=label,
        )
    of_what = "what they have seen" if prompt_length is None else f"a prompt of {prompt_length:,} tokens"
    axes.set(title=f"What layers may keep of {of_what}", xlabel="layer", ylabel="tokens per KV head", ylim=(0, None))
    axes.legend(frameon=False, fontsize="small")
    tidy(axes)
    return figure


def distinct_labels(caches: Sequence[Any]) -> list[str]:
    """The classes of caches, with the settings in which caches of one class differ."""
    labels = []
    for cache in caches:
        settings, label = cache.settings or {}, type(cache).__name__
        alike = [other.settings or {} for other in caches if type(other) is type(cache)]
        differing = [name for name, value in settings.items() if any(other.get(name) != value for other in alike)]
        shown = ", ".join(f"{name}={settings[name]!r}" for name in differing)
        labels.append(f"{label}({shown})" if shown else label)
    return labels


def draw(cache: Cache, row: int, height: float, *parts: Callable[["Axes", Cache, int], None]) -> "Figure":
    """A figure of one cache with a title, whose parts are drawn below each other."""
    require_filled(cache)
    row = as_row(row, cache.batch_size)
    figure = new_figure(height)
    # A map takes more room than bars.
    axes = figure.subplots(len(parts), 1, squeeze=False, height_ratios=(2, 3)[: len(parts)])[:, 0]
    for part_axes, draw_part in zip(axes, parts, strict=True):
        draw_part(part_axes, cache, row)
    lost = "" if loses_tokens(cache) else ", none of them lost"
    set_title = axes[0].set_title if len(parts) == 1 else figure.suptitle
    set_title(f"{type(cache).__name__}: {tokens_seen(cache):,} tokens seen{lost}")
    return figure


def draw_kept_tokens(axes: "Axes", cache: Cache, row: int) -> None:
    """Bars of tokens over layers, of all rows."""
    held = {layer.place.layer_idx: num_held_by_head(layer).float().cpu() for layer in compressed_layers(cache)}
    means = {index: counts.mean().item() for index, counts in held.items()}
    label = f"{'kept' if loses_tokens(cache) else 'in the buffer'}, mean over KV heads and rows"
    axes.bar(list(means), list(means.values()), color=COLORS[0], label=label)
    ranged = [index for index, counts in held.items() if counts.amin() < counts.amax()]
    if ranged:
        middle = [means[index] for index in ranged]
        below = [means[index] - held[index].amin().item() for index in ranged]
        above = [held[index].amax().item() - means[index] for index in ranged]
        bars = axes.errorbar(ranged, middle, [below, above], fmt="none", ecolor="black", capsize=2)
        bars.set_label("range over KV heads and rows")
    others = {i: latest_tokens(layer) for i, layer in enumerate(cache.layers) if i not in held}
    if others:
        axes.bar(list(others), list(others.values()), color=OTHER_LAYERS_COLOR, label="layers of transformers")
    seen = tokens_seen(cache)
    axes.axhline(seen, color="black", linewidth=0.8, linestyle=":", label="tokens seen")
    # The room above the line is for the legend.
    axes.set(xlabel="layer", ylabel="tokens", xlim=(-0.7, len(cache.layers) - 0.3), ylim=(0, 1.25 * seen))
    axes.legend(frameon=False, fontsize="small", ncols=4, loc="upper center")
    tidy(axes)


def draw_kept_positions(axes: "Axes", cache: Cache, row: int) -> None:
    """A map of positions over layers."""
    num_positions = tokens_seen(cache, row)
    image = draw_map(axes, kept_positions(cache, num_positions, row), vmin=0, vmax=1)
    of_row = f" in row {row}" if cache.batch_size > 1 else ""
    axes.set(xlabel=position_label(num_positions) + of_row, ylabel="layer")
    hold = " that keep it" if loses_tokens(cache) else "\nthat have it in the buffer"
    axes.figure.colorbar(image, ax=axes, label=f"share of KV heads{hold}")
