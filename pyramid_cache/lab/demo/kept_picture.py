"""The picture of what each cache kept: how many tokens per layer, and which positions."""

from pathlib import Path

from matplotlib.figure import Figure

from pyramid_cache.lab.demo.planted_number import Prompts
from pyramid_cache.lab.demo.timed_answers import BASELINE, CACHES, Result
from pyramid_cache.plot.figure import DPI, draw_map


# Colour and line style; where two lines coincide, the dashes of the upper one show the lower one.
STYLES = {
    "dynamic": ("#8a8a8a", "-"),
    "pyramid": ("#1f5fa8", "-"),
    "pyramid-config": ("#8cc5ea", "--"),
    "h2o": ("#d1652a", "-"),
    "streaming": ("#3b8f5a", "--"),
    "shadow": ("#7b3fa0", "-"),
}
FACT_COLOR = "#c2185b"


def draw(results: list[Result], prompts: Prompts, path: Path) -> None:
    """
    Draws the tokens that each cache keeps per layer and, for each but the baseline, a map of the positions that it
    keeps of the first row, layer × position.

    Args:
        path (`Path`): Where the PNG goes.
    """
    maps = [result for result in results if result.cache != BASELINE]
    figure = Figure(figsize=(10, 3.2 + 1.9 * len(maps)), layout="constrained")
    axes = figure.subplots(1 + len(maps), 1, squeeze=False, height_ratios=[1.5] + [1] * len(maps))[:, 0]
    for result in results:
        color, style = STYLES[result.cache]
        label = CACHES[result.cache]
        axes[0].plot(result.kept_tokens, drawstyle="steps-mid", color=color, linestyle=style, label=label)
    axes[0].set(title="tokens kept per layer", xlabel="layer", ylabel="tokens", ylim=(0, None))
    axes[0].legend(frameon=False, ncols=len(results), fontsize="small", loc="lower left")
    axes[0].spines[["top", "right"]].set_visible(False)
    fact_start, fact_end = prompts.fact_spans[0]
    image = None
    for axis, result in zip(axes[1:], maps, strict=True):
        image = draw_map(axis, result.kept_positions, vmin=0, vmax=1)
        # Above the map, so that it hides nothing of what is kept there.
        axis.plot(
            [fact_start, fact_end], [-1, -1], color=FACT_COLOR, linewidth=4, clip_on=False, solid_capstyle="butt"
        )
        axis.axvline(prompts.num_tokens, color="black", linewidth=0.6, linestyle=":")
        axis.set(title=f"{CACHES[result.cache]}: positions held", ylabel="layer")
    if image is not None:
        axes[-1].set_xlabel("position in the sequence (red bar: the planted fact; dotted line: the end of the prompt)")
        figure.colorbar(image, ax=axes[1:].tolist(), label="share of the KV heads that hold it", shrink=0.6)
    figure.savefig(path, dpi=DPI)
