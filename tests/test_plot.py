"""What figures of caches show, read back from their axes."""

import itertools
import re
import sys
from typing import Any

import numpy as np
import pytest
import torch
from caches import CacheCase, every_cache
from kept_caches import hand_made_cache
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from models import build_config, build_model, drive, generate, random_rows, random_tokens, tiny_model
from transformers import DynamicCache, EncoderDecoderCache

from pyramid_cache import (
    AdaKVCache,
    H2OCache,
    MassiveActivationCache,
    PyramidCache,
    SnapKVCache,
    StreamingLLMCache,
    TOVACache,
)
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.plot import ScoreRecorder, plot_budgets, plot_kept_positions, plot_kept_tokens, plot_scores
from pyramid_cache.plot.figure import MAX_CELLS, shrink
from pyramid_cache.plot.held import kept_positions, kept_tokens


# Two layers, two rows, two KV heads, of seven tokens each.
HELD = [
    [[[0, 5, 6], [6, 2, 0]], [[0, -1, 6], [4, 6, -1]]],
    [[[6, -1, -1], [6, -1, -1]], [[6, -1, -1], [6, -1, -1]]],
]
MAPS = {
    0: [[1, 0, 0.5, 0, 0, 0.5, 1], [0, 0, 0, 0, 0, 0, 1]],
    1: [[0.5, 0, 0, 0, 0.5, 0, 1], [0, 0, 0, 0, 0, 0, 1]],
}
WITHOUT_SCORES = (
    "AttentionMatching",
    "KVzip",
    "StreamingLLM",
    "KeyDiff",
    "Knorm",
    "ExpectedAttention",
    "ShadowKV",
    "KIVI",
)


def bars(axes: Axes) -> list[tuple[float, float]]:
    """The centre and the height of each bar."""
    found = sorted((bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in axes.patches)
    return [(pytest.approx(x), pytest.approx(height)) for x, height in found]


def legend_texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def map_of(axes: Axes) -> np.ndarray:
    """The values of the map, NaN where it has none."""
    return np.ma.filled(axes.images[0].get_array().astype(float), np.nan)


class TestKeptTokens:
    def test_bars_are_means_with_ranges_where_heads_or_rows_differ(self) -> None:
        [axes] = plot_kept_tokens(hand_made_cache(HELD, 7)).axes
        # Layer 0 holds 3, 3, 2 and 2 tokens.
        assert bars(axes) == [(0, 2.5), (1, 1)]
        assert [segment.tolist() for segment in axes.collections[0].get_segments()] == [[[0, 2], [0, 3]]]
        assert [line.get_ydata() for line in axes.lines if line.get_label() == "tokens seen"] == [[7, 7]]
        assert axes.get_xlabel() == "layer" and axes.get_ylabel() == "tokens"
        assert axes.get_title() == "H2OCache: 7 tokens seen"
        labels = {"kept, mean over KV heads and rows", "range over KV heads and rows", "tokens seen"}
        assert set(legend_texts(axes)) == labels
        assert kept_tokens(hand_made_cache(HELD, 7)) == [3, 1]  # the head that holds most counts

        # No range where all hold as much.
        [axes] = plot_kept_tokens(hand_made_cache([[[[0, 1]]], [[[1, -1]]]], 2)).axes
        assert bars(axes) == [(0, 2), (1, 1)]
        assert "range over KV heads and rows" not in legend_texts(axes)

    def test_layers_of_hybrid_models(self) -> None:
        """Grey bars; in a map what they hold, the latest tokens or nothing; no line of budgets."""
        kept, nothing = [1.0, 1.0, *[0.0] * 24, *[1.0] * 4], [-1.0] * 30
        for name, expected_bars, expected_map in (
            # A window of 8 holds 7 tokens beside the next one.
            ("gemma3", [(0, 6), (1, 7), (2, 6)], [kept, [0.0] * 23 + [1.0] * 7, kept]),
            ("jamba", [(0, 0), (1, 6), (2, 0)], [nothing, kept, nothing]),  # layers that hold no tokens one by one
        ):
            model = build_model(name)
            cache = StreamingLLMCache(model.config, budget=6, num_sink_tokens=2)
            generate(model, cache, random_rows((30,)), 1)
            [axes] = plot_kept_tokens(cache).axes
            assert bars(axes) == list(enumerate(kept_tokens(cache))) == expected_bars
            colors = {container[0].get_facecolor() for container in axes.containers}
            assert len(colors) == 2 and "layers of transformers" in legend_texts(axes)
            values = map_of(plot_kept_positions(cache).axes[0])
            assert np.nan_to_num(values, nan=-1.0).tolist() == expected_map
        cache = DynamicCache()
        cache.update(torch.zeros(1, 2, 6, 8), torch.zeros(1, 2, 6, 8), 0)
        assert kept_positions(cache, 2).tolist() == [[1, 1]]  # of a row with padding, which has seen two tokens
        [axes] = plot_budgets(H2OCache(build_config("gemma3"), budget=5), prompt_length=9).axes
        assert list(axes.lines[0].get_xdata()) == [0, 2]


class TestKeptPositions:
    def test_map_is_the_share_of_heads(self) -> None:
        for row, expected_row in ((0, 0), (1, 1), (-1, 1)):
            axes, color_axes = plot_kept_positions(hand_made_cache(HELD, 7), row=row).axes
            assert map_of(axes).tolist() == MAPS[expected_row]
            assert axes.images[0].get_clim() == (0, 1)
            assert axes.get_xlim() == (0, 7) and axes.get_ylim() == (1.5, -0.5)  # the first layer on top
            assert axes.get_xlabel() == f"position in row {expected_row}" and axes.get_ylabel() == "layer"
            assert color_axes.get_ylabel() == "share of KV heads that keep it"

    def test_of_many_positions_neighbours_are_averaged(self) -> None:
        num_seen = 2 * MAX_CELLS + 1
        for held, seen, size, cells, width in (
            # Three to a cell; the last cell has all of its three, of 2,049.
            ([0, 2, 3, num_seen - 1], num_seen, 3, {0: 2 / 3, 1: 1 / 3, 2: 0, 682: 1 / 3}, 2049),
            # The last cell of 1,025 positions has one of them alone, and reaches beyond the axis.
            ([MAX_CELLS], MAX_CELLS + 1, 2, {512: 1}, MAX_CELLS + 2),
        ):
            axes, _ = plot_kept_positions(hand_made_cache([[[held]]], seen)).axes
            [values] = map_of(axes)
            assert len(values) == max(cells) + 1 and {cell: pytest.approx(values[cell]) for cell in cells} == cells
            assert axes.get_xlabel() == f"position (means of {size} neighbours)"
            assert axes.images[0].get_extent()[:2] == [0, width] and axes.get_xlim() == (0, seen)
        values = torch.tensor([[1.0, 0.0, torch.nan, 4.0, torch.nan, torch.nan, 3.0]])
        assert str(shrink(values, 2).tolist()) == "[[0.5, 4.0, nan, 3.0]]"


class TestBudgets:
    def test_of_a_prompt_that_none_has_read(self) -> None:
        config = build_config("llama", num_hidden_layers=2)
        caches = {
            PyramidCache(config, budget=0.5): [25, 15],
            H2OCache(config, budget=12): [12, 12],
            SnapKVCache(config, budget=0.25): [10, 10],
            StreamingLLMCache(config, budget=64): [40, 40],
            TOVACache(config, budget=1.0): [40, 40],
        }
        [axes] = plot_budgets(*caches, prompt_length=40).axes
        lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
        assert lines == [([0, 1], budget) for budget in caches.values()]
        assert legend_texts(axes) == [type(cache).__name__ for cache in caches]
        assert axes.get_title() == "What layers may keep of a prompt of 40 tokens"
        assert axes.get_xlabel() == "layer" and axes.get_ylabel() == "tokens per KV head"
        styles = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines}
        assert len(styles) == len(caches)
        # Caches of one class are told apart by what differs; labels may be given.
        caches = [PyramidCache(config, budget=0.4, decay_ratio=ratio) for ratio in (0.3, 0.6)]
        caches.append(H2OCache(config, budget=0.4))
        expected = ["PyramidCache(decay_ratio=0.3)", "PyramidCache(decay_ratio=0.6)", "H2OCache"]
        assert legend_texts(plot_budgets(*caches, prompt_length=100).axes[0]) == expected
        assert legend_texts(plot_budgets(*caches, prompt_length=100, labels=[*"abc"]).axes[0]) == [*"abc"]

    def test_of_what_was_seen(self) -> None:
        model = tiny_model("llama")
        caches = [H2OCache(model.config, budget=budget) for budget in (0.25, 30, 1.0, "24KiB")]
        for cache in caches:
            generate(model, cache, random_rows((40, 20)), 4)
        [axes] = plot_budgets(*caches).axes
        # Rows of 43 and 23 tokens. Both of 24 KiB over 3 layers, each with a slot to spare: 2 KV heads of 2 * 16 * 4 +
        # 8 bytes make 272 a token, and 8,192 bytes a layer for 2 rows 15 tokens.
        assert [line.get_ydata().tolist() for line in axes.lines] == [[7.5] * 3, [26.5] * 3, [33] * 3, [14] * 3]
        assert legend_texts(axes) == [f"H2OCache(budget={budget!r})" for budget in (0.25, 30, 1.0, "24KiB")]


class TestWholeCache:
    @every_cache
    def test_every_cache_is_drawn_and_recorded(self, case: CacheCase) -> None:
        model = tiny_model("llama")
        cache, other = case.build(model), case.build(model)
        name, adds_up_scores = type(cache).__name__, not case.name.startswith(WITHOUT_SCORES)
        if not adds_up_scores:
            with pytest.raises(ValueError, match=f"{name} adds up no scores: .*`plot_kept_positions`"):
                ScoreRecorder(cache)
        recorder, rows = ScoreRecorder(cache, row=1) if adds_up_scores else None, random_rows((40, 28))
        sequences = generate(model, cache, rows, 26, logits_processor=[recorder] if recorder else []).sequences
        tokens, positions, color_axes = cache.plot(row=1).axes
        counts = [(cache.positions(i) >= 0).sum(-1).flatten().tolist() for i in range(3)]
        assert bars(tokens) == [(index, sum(held) / 4) for index, held in enumerate(counts)]
        held = [cache.positions(i)[1].flatten().tolist() for i in range(3)]  # of 28 + 25 tokens
        assert map_of(positions).tolist() == [[slots.count(token) / 2 for token in range(53)] for slots in held]
        lost = ", none of them lost" if case.brings_back else ""
        assert tokens.figure.get_suptitle() == f"{name}: 65 tokens seen{lost}"
        held = "in the buffer" if case.brings_back else "kept"
        assert f"{held}, mean over KV heads and rows" in legend_texts(tokens)
        assert color_axes.get_ylabel().endswith("that have it in the buffer" if case.brings_back else "that keep it")
        assert tokens.figure._repr_png_().startswith(b"\x89PNG")
        assert len(plot_budgets(cache).axes[0].lines[0].get_ydata()) == 3
        if recorder is None:
            assert all(layer.held_scores() is None for layer in cache.layers)
            with pytest.raises(ValueError, match=f"{name} adds up no scores"):
                plot_scores(cache, 0)
            return
        # Recording changes nothing, and its last line is what `plot_scores` draws.
        assert torch.equal(sequences, generate(model, other, rows, 26).sequences)
        assert recorder.num_seen == list(range(28, 54)) and list(recorder.scores) == [0, 1, 2]
        for layer_idx in range(3):
            [line] = plot_scores(cache, layer_idx, row=1).axes[0].lines
            drawn = torch.full((53,), torch.nan)
            drawn[line.get_xdata()] = torch.tensor(line.get_ydata(), dtype=torch.float32)
            assert recorder.table(layer_idx)[-1].nan_to_num(-1).equal(drawn.nan_to_num(-1))
        assert isinstance(recorder.plot(), Figure)

    def test_missing_matplotlib_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "matplotlib.figure", None)
            for draw in (CompressedCache.plot, plot_kept_tokens, plot_kept_positions, plot_budgets):
                with pytest.raises(ImportError, match=re.escape("pip install 'pyramid_cache[plot]'")):
                    draw(hand_made_cache(HELD, 7))
        # What matplotlib lacks itself is not called matplotlib.
        monkeypatch.delitem(sys.modules, "matplotlib.figure")
        monkeypatch.setitem(sys.modules, "PIL", None)
        monkeypatch.delitem(sys.modules, "matplotlib.image")
        with pytest.raises(ImportError) as caught:
            plot_kept_tokens(hand_made_cache(HELD, 7))
        assert "pyramid_cache[plot]" not in str(caught.value)


class TestScores:
    SCORES = [
        [[[4.0, 0.25, 1.0], [3.0, 0.5, 2.0]], [[0.5, 9.0, 0.125], [1.0, 2.0, 9.0]]],
        [[[1.0, 9.0, 9.0], [0.0, 9.0, 9.0]], [[1.0, 9.0, 9.0], [1.0, 9.0, 9.0]]],
    ]

    def test_points_are_means_of_the_heads_that_hold_a_token(self) -> None:
        cache = hand_made_cache(HELD, 7, self.SCORES)
        [axes] = plot_scores(cache, 0).axes
        # Head 0 holds 0, 5 and 6 with 4, 1/4 and 1; head 1 holds 6, 2 and 0 with 3, 1/2 and 2.
        assert axes.lines[0].get_xydata().tolist() == [[0, 3], [2, 0.5], [5, 0.25], [6, 2]]
        segments = [segment.tolist() for segment in axes.collections[0].get_segments()]
        assert segments == [[[0, 2], [0, 4]], [[2, 0.5], [2, 0.5]], [[5, 0.25], [5, 0.25]], [[6, 1], [6, 3]]]
        assert axes.get_title() == "H2OCache: scores of layer 0, row 0"
        assert axes.get_ylabel() == "attention so far\n(sum of probabilities over queries)"
        # A score of zero has its place.
        zeros = hand_made_cache([[[[0, 1]]]], 2, [[[[0.0, 0.0]]]])
        for drawn, layer_idx, row, points in (
            (cache, 0, 1, [[0, 0.5], [4, 1], [6, 1.0625]]),
            (cache, 1, 0, [[6, 0.5]]),
            (zeros, 0, 0, [[0, 0], [1, 0]]),
        ):
            figure = plot_scores(drawn, layer_idx, row)
            assert figure.axes[0].lines[0].get_xydata().tolist() == points and figure._repr_png_()

    def test_are_sums_or_means_of_attention(self) -> None:
        rows, model = random_rows((25, 25)), tiny_model("llama")
        eager = build_model("llama", seed=sum(b"llama"), attention="eager")
        with torch.no_grad():
            attentions = eager(torch.stack(rows), output_attentions=True).attentions  # (batch, heads, queries, keys)
        windows = {H2OCache: None, SnapKVCache: 4, AdaKVCache: 4, MassiveActivationCache: 4, TOVACache: 1}
        for (cache_class, window_size), budget in itertools.product(windows.items(), (12, 4096)):
            cache = cache_class(model.config, budget, **({"window_size": 4} if window_size == 4 else {}))
            generate(model, cache, rows, 1)
            for layer_idx, attention in enumerate(attentions):
                by_group = attention.unflatten(1, (2, 2))
                expected = by_group.sum(dim=(2, 3))
                if window_size is not None:
                    expected = by_group[:, :, :, -window_size:].mean(dim=(2, 3))
                if cache_class is TOVACache:
                    expected = expected.mean(dim=1, keepdim=True).expand(-1, 2, -1)
                positions, scores = cache.positions(layer_idx), cache.layers[layer_idx].held_scores()
                held = positions >= 0
                assert scores.shape == positions.shape and held.any() and scores[~held].isnan().all()
                found = expected.gather(-1, positions.clamp(min=0))
                torch.testing.assert_close(scores[held], found[held], rtol=1e-4, atol=1e-6)
            assert window_size is None or str(window_size) in plot_scores(cache, 1).axes[0].get_ylabel()
        # Tokens that are recorded, and may be taken back, have no score yet.
        cache.activate_past_recording()
        before = cache.layers[0].held_scores()
        with torch.no_grad():
            model(random_tokens(2, 3), past_key_values=cache)
        scores = cache.layers[0].held_scores()
        assert scores.shape == cache.positions(0).shape and scores[..., -3:].isnan().all()
        assert scores[..., :-3].nan_to_num(-1).equal(before.nan_to_num(-1))


class TestRecorder:
    def test_table_follows_a_loop_of_ones_own(self) -> None:
        model = tiny_model("llama")
        cache = H2OCache(model.config, budget=12)
        recorder = ScoreRecorder(cache, [2, 0])
        expected = torch.full((5, 24), -1.0)

        def after_step(step: int) -> None:
            recorder.record()
            recorder.record()  # without a forward pass between them
            held, scores = cache.positions(2)[0].tolist(), cache.layers[2].held_scores()[0].tolist()
            for position in range(20 + step):
                found = [s[h.index(position)] for h, s in zip(held, scores, strict=True) if position in h]
                if found:
                    expected[step, position] = sum(found) / len(found)

        drive(model, cache, random_rows((20,)), 4, after_step)
        assert recorder.num_seen == [20, 21, 22, 23, 24]
        table = recorder.table(2).nan_to_num(-1)
        torch.testing.assert_close(table, expected)
        first, second, color_axes = recorder.plot().axes
        assert (first.get_title(), second.get_title()) == ("layer 2", "layer 0")
        assert np.nan_to_num(map_of(first), nan=-1) == pytest.approx(table.numpy())
        assert first.get_ylabel() == "forward pass" and second.get_xlabel() == "position"
        largest = max(recorder.table(layer_idx).nan_to_num(0).max().item() for layer_idx in (0, 2))
        assert all(axes.images[0].get_clim() == pytest.approx((largest / 1e5, largest)) for axes in (first, second))
        assert color_axes.get_ylabel().startswith("attention so far")
        # A score of zero has the lowest colour.
        recorder = ScoreRecorder(hand_made_cache([[[[0, 1]]]], 2, [[[[0.0, 8.0]]]]))
        recorder.record()
        image = recorder.plot().axes[0].images[0]
        assert image.cmap(image.norm(image.get_array()))[0].tolist() == [[*image.cmap(0.0)], [*image.cmap(1.0)]]

    def test_guesses_that_are_taken_back(self) -> None:
        model = tiny_model("llama")
        cache = H2OCache(model.config, budget=12)
        recorder = ScoreRecorder(cache)
        settings = {"max_new_tokens": 8, "prompt_lookup_num_tokens": 3, "logits_processor": [recorder]}
        model.generate(random_tokens(1, 30).repeat(1, 2), past_key_values=cache, **settings)
        assert len(recorder.num_seen) > 1 and recorder.plot()._repr_png_()


class TestRefusals:
    def test_caches_and_rows(self) -> None:
        empty, filled, broken = H2OCache(build_config("llama"), budget=4), *(hand_made_cache(HELD, 7) for _ in "ab")
        filled.reset()
        broken.layers[0].state.num_seen = 8
        refusals: list[tuple[Any, type[Exception], str]] = [
            (empty, ValueError, "The H2OCache holds nothing yet: run the model with it first"),
            (filled, ValueError, "holds nothing yet"),
            (broken, RuntimeError, "An earlier forward pass broke off"),
            (DynamicCache(), ValueError, "A DynamicCache is no cache of pyramid_cache"),
            (EncoderDecoderCache(filled, DynamicCache()), ValueError, "Give its `self_attention_cache`"),
        ]
        with_rows = (CompressedCache.plot, plot_kept_positions, lambda cache, row=0: plot_scores(cache, 0, row))
        for draw in (*with_rows, plot_kept_tokens, plot_budgets):
            for cache, kind, message in refusals[:3] if draw is CompressedCache.plot else refusals:
                with pytest.raises(kind, match=message):
                    draw(cache)
        for row, draw in itertools.product((2, -3, True, 0.0, "0", None), with_rows):
            with pytest.raises(ValueError, match=re.escape(f"There is no row {row!r}: the cache holds 2 rows")):
                draw(hand_made_cache(HELD, 7), row=row)
        for layer_idx in (2, -1, True, "0", 0.0):
            for draw in (plot_scores, lambda cache, layer_idx: ScoreRecorder(cache, [layer_idx])):
                with pytest.raises(ValueError, match=re.escape(f"no layer {layer_idx!r}: the cache has 2 layers")):
                    draw(hand_made_cache(HELD, 7), layer_idx)

    def test_settings(self) -> None:
        caches = [H2OCache(build_config("llama"), budget=budget) for budget in (0.25, "24KiB")]
        hybrid, held = H2OCache(build_config("gemma3"), budget=5), hand_made_cache(HELD, 7)
        recorder = ScoreRecorder(held, [1], row=2)
        for call, message in (
            (lambda: plot_budgets(*caches, labels=["1"]), "`labels=['1']` must be a label for each of the 2 caches"),
            (lambda: plot_budgets(*caches, labels="ab"), "`labels='ab'` must be"),
            (lambda: plot_budgets(*caches, prompt_length=0), "`prompt_length=0` must be a positive number of tokens"),
            (lambda: plot_budgets(*caches, prompt_length=True), "`prompt_length=True` must be"),
            (lambda: plot_budgets(*caches, prompt_length=9), "How many tokens the 24,576 bytes of the H2OCache come"),
            (lambda: plot_budgets(*caches), "The H2OCache holds nothing yet: run the model with it first"),
            (lambda: plot_budgets(), "give one cache at least"),
            (lambda: ScoreRecorder(held, []), "`layer_indices=[]` must be a list"),
            (lambda: ScoreRecorder(held, 0), "`layer_indices=0` must be a list"),
            (lambda: ScoreRecorder(held, "0"), "`layer_indices='0'` must be a list"),
            (lambda: ScoreRecorder(hybrid, [1]), "Layer 1 is a DynamicSlidingWindowLayer of transformers"),
            (lambda: recorder.plot(), "Nothing has been recorded yet: pass `logits_processor=[recorder]`"),
            (lambda: recorder.table(0), "Layer 0 was not recorded, but [1] were"),
            (lambda: recorder.record(), "There is no row 2"),
        ):
            with pytest.raises(ValueError, match=re.escape(message)):
                call()

    def test_caches_that_scored_nothing_say_why(self) -> None:
        model = tiny_model("llama")
        for cache in (H2OCache(model.config, budget=1.0),):
            recorder = ScoreRecorder(cache)
            generate(model, cache, random_rows((40, 28)), 1, logits_processor=[recorder])
            with pytest.raises(ValueError, match="Layer 1 of the .* has scored no token of row 0 .* Lower"):
                plot_scores(cache, 1)
            with pytest.raises(ValueError, match="has scored no token"):
                recorder.plot()
