"""`cache.show`: the text of a prompt with what layers keep of it, compared with texts written out by hand."""

import contextlib
import io
import re
from collections.abc import Iterable
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from caches import CacheCase, every_cache
from kept_caches import hand_made_cache
from models import generate, left_pad, random_rows, tiny_model
from text_tokenizers import byte_tokenizer, sentence_tokenizer

from pyramid_cache import H2OCache
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.plot.text import group_tokens, ranges, style_of


PAGE = Path(__file__).parents[1] / "docs" / "plots.md"


def encode(text: str) -> torch.Tensor:
    return byte_tokenizer()(text, return_tensors="pt").input_ids


def cache_of(held: list[list[int]], num_seen: int) -> H2OCache:
    """A cache of one row whose layers hold these positions, in one KV head."""
    longest = max(len(positions) for positions in held)
    return hand_made_cache([[[positions + [-1] * (longest - len(positions))]] for positions in held], num_seen)


class TestText:
    def test_html_is_as_written_here(self) -> None:
        # A "<", a line break, the two bytes of "é", and a special token; of three layers.
        input_ids = torch.cat([encode("<\né"), torch.tensor([[byte_tokenizer().eos_token_id]])], dim=1)
        html = cache_of([[0, 2], [0, 3], [0]], 5).show(byte_tokenizer(), input_ids)._repr_html_()
        spans = [
            '<span title="&#x27;&lt;&#x27;, position 0: kept by 3 of 3 layers: 0-2" '
            'style="background:#08519c;color:#ffffff">&lt;</span>',
            '<span title="&#x27;Ċ&#x27;, position 1: kept by 0 of 3 layers" '
            'style="background:#ffffff;color:#767676">\n</span>',
            '<span title="&#x27;Ã&#x27;, position 2: kept by 1 of 3 layers: 0&#10;'
            '&#x27;©&#x27;, position 3: kept by 1 of 3 layers: 1" '
            'style="background:#adc5de;color:#000000">é</span>',
            '<span title="&#x27;&lt;end&gt;&#x27;, position 4: kept by 0 of 3 layers" '
            'style="background:#ffffff;color:#767676">&lt;end&gt;</span>',
        ]
        assert "".join(spans) in html
        assert "H2OCache, 5 tokens: 1 kept by all 3 layers, 2 kept by none." in html
        legend = re.findall(r'style="([^"]*);padding:0 0.5em">(\d)</span>', html)
        assert legend == [(style_of(count / 3), str(count)) for count in range(4)]
        # The first newline in <pre> is none of the text.
        assert re.search(r"<pre[^>]*>\n<span", html)
        # Control characters are written out.
        html = cache_of([[0]], 4).show(byte_tokenizer(), encode("\0\r\t&"))._repr_html_()
        assert re.findall(r">([^<]*)</span>", html)[-4:] == [r"\x00", r"\r", "\t", "&amp;"]

    def test_text_puts_what_no_layer_keeps_in_brackets(self) -> None:
        shown = cache_of([[0, 4, 6], [4]], 8).show(byte_tokenizer(), encode("a bc\nd<e"))
        expected = "H2OCache, 8 tokens: 1 kept by all 2 layers, 5 kept by none. ⟦Kept by no layer⟧.\n\na⟦ bc⟧\n⟦d⟧<⟦e⟧"
        assert str(shown) == repr(shown) == expected
        assert shown.num_layers_per_token == [1, 0, 0, 0, 2, 0, 1, 0]

    def test_a_row_is_chosen_and_one_head_is_enough(self) -> None:
        cache = hand_made_cache([[[[0, 1], [1, 2]], [[1, 3], [1, -1]]], [[[3, 0], [0, -1]], [[0, -1], [1, -1]]]], 4)
        input_ids = torch.cat([encode("abcd"), encode("efgh")])
        for row, counts, text in ((0, [2, 1, 1, 1], "abcd"), (-1, [1, 2, 0, 1], "ef⟦g⟧h")):
            shown = cache.show(byte_tokenizer(), input_ids, row=row)
            assert shown.num_layers_per_token == counts and str(shown).endswith(text)

    def test_a_prompt_is_the_beginning_and_a_sequence_has_one_token_more(self) -> None:
        cache = cache_of([[0, 3]], 4)
        prompt = cache.show(byte_tokenizer(), encode("ab"))
        assert prompt.num_layers_per_token == [1, 0] and "2 tokens behind these are not shown" in str(prompt)
        sequence = cache.show(byte_tokenizer(), encode("abcd<"))
        assert sequence.num_layers_per_token == [1, 0, 0, 1] and "behind" not in str(sequence)
        unseen = 'position 4: not seen yet" style="border:1px dotted #767676">&lt;</span>'
        assert unseen in sequence._repr_html_() and str(sequence).endswith("a⟦bc⟧d<")
        [whole] = cache.show(byte_tokenizer(), encode("abcd")[0]).is_held.tolist()  # of one row, without a batch
        assert whole == [True, False, False, True]

    def test_layers_of_hybrid_models_do_not_count(self) -> None:
        model, rows = tiny_model("gemma3"), random_rows((30,))
        cache = H2OCache(model.config, budget=12)
        generate(model, cache, rows, 1)
        shown = cache.show(byte_tokenizer(), rows[0])
        assert "2 of the model's 3 layers count: the others are transformers' own." in shown.heading
        assert shown.num_layers_per_token == counts_of(cache, 0, 30, (0, 2))
        assert "position 29: kept by 2 of 2 layers: 0, 2" in shown._repr_html_()


def counts_of(cache: CompressedCache, row: int, num_tokens: int, layers: Iterable[int]) -> list[int]:
    """How many layers hold each token of a row, in some KV head."""
    held = [cache.positions(layer)[row].flatten().tolist() for layer in layers]
    return [sum(position in positions for positions in held) for position in range(num_tokens)]


@every_cache
def test_counts_of_every_cache_follow_a_loop(case: CacheCase) -> None:
    model, rows = tiny_model("llama"), random_rows((40, 28))
    cache = case.build(model)
    output = generate(model, cache, rows, 5)
    input_ids, attention_mask = left_pad(rows)
    for row, length in enumerate((40, 28)):
        counts = counts_of(cache, row, length + 4, range(3))
        for mask in (None, attention_mask):
            shown = cache.show(byte_tokenizer(), output.sequences, row, mask)
            assert shown.num_layers_per_token == counts
            text = byte_tokenizer().decode(output.sequences[row, 40 - length :])
            assert "".join(group.text for group in shown.groups) == text
            prompt = cache.show(byte_tokenizer(), input_ids, row, mask)
            assert prompt.num_layers_per_token == counts[:length]
    assert ("None is lost: what is in the buffer" in shown.heading) == case.brings_back
    assert ("in the buffer of" in shown._repr_html_()) == case.brings_back


class TestGroups:
    def test_ranges(self) -> None:
        for numbers, text in (([], ""), ([3], "3"), ([0, 1, 2, 7], "0-2, 7"), ([1, 3, 4], "1, 3-4"), ([5, 6], "5-6")):
            assert ranges(numbers) == text

    def test_tokens_of_a_character_stay_together(self) -> None:
        for text, sizes in (
            ("aé€😀b", [1, 2, 3, 4, 1]),
            ("é", [2]),
            ("日本\n語", [3, 3, 1, 3]),
            ("e\u0301", [1, 2]),  # a letter and an accent of its own
            ("  a ", [1, 1, 1, 1]),
        ):
            token_ids = encode(text)[0].tolist()
            groups = group_tokens(byte_tokenizer(), token_ids)
            assert [(group.start, group.stop) for group in groups] == [*pairwise(accumulate(sizes, initial=0))]
            assert "".join(group.text for group in groups) == text
        # A text may end inside a character. What is no text is cut into pieces.
        lone = encode("é")[0, 1:].tolist()
        for token_ids, expected in (
            (encode("a😀")[0, :-1].tolist(), [(0, 1, "a"), (1, 4, "\ufffd")]),
            (lone * 20 + encode("b")[0].tolist(), [(0, 16, "\ufffd" * 16), (16, 21, "\ufffd" * 4 + "b")]),
        ):
            groups = group_tokens(byte_tokenizer(), token_ids)
            assert [(group.start, group.stop, group.text) for group in groups] == expected

    def test_tokenizers_that_mark_words(self) -> None:
        tokenizer = sentence_tokenizer()
        for text in ("It is! a é😀 truth", "It", "😀", "It is a truth"):
            token_ids = tokenizer(text, add_special_tokens=False).input_ids
            groups = [group.text for group in group_tokens(tokenizer, token_ids)]
            assert "".join(groups) == tokenizer.decode(token_ids) == text
        assert groups == ["It", " is", " a", " tr", "uth"]


class TestRefusals:
    def test_input_ids(self) -> None:
        cache = hand_made_cache([[[[0]], [[1]]]], 7)
        for input_ids, message in (
            (torch.ones(2, 9, dtype=torch.long), "`input_ids` have 9 tokens, but the cache has seen 7"),
            (torch.ones(3, 7, dtype=torch.long), r"`input_ids` are torch.int64 \(3, 7\), but the cache holds 2 rows"),
            (torch.ones(7, dtype=torch.long), r"`input_ids` are torch.int64 \(1, 7\), but the cache holds 2 rows"),
            (torch.ones(2, 7), r"`input_ids` are torch.float32 \(2, 7\)"),
            (torch.ones(2, 7, 1, dtype=torch.long), r"`input_ids` are torch.int64 \(2, 7, 1\)"),
            (torch.ones(2, 0, dtype=torch.long), "`input_ids` have no tokens"),
            ("a text", r"`input_ids` must be a tensor \(batch, tokens\) of integers, but is a str"),
            # No tokens: labels, or another tokenizer's.
            (torch.tensor([[5, -100], [1, 1]]), "hold -100, which is none of the"),
            (torch.tensor([[5, 10**7], [1, 1]]), "hold 10000000, which is none of the"),
        ):
            with pytest.raises(ValueError, match=message):
                cache.show(byte_tokenizer(), input_ids)
        with pytest.raises(ValueError, match="There is no row 2: the cache holds 2 rows"):
            cache.show(byte_tokenizer(), torch.ones(2, 7, dtype=torch.long), row=2)
        cache.reset()
        with pytest.raises(ValueError, match="The H2OCache holds nothing yet"):
            cache.show(byte_tokenizer(), torch.ones(2, 7, dtype=torch.long))

    def test_padding_that_is_not_in_front(self) -> None:
        """The second row has a turn of one token and one of two, each behind some padding."""
        cache = hand_made_cache([[[[0]], [[1]]]], 8)
        cache.layers[0].state.row_lengths = [8, 3]
        input_ids = torch.tensor([[9] * 8, [0, 0, 0, 5, 0, 0, 6, 7]])
        message = "seen 8 columns, and 3 tokens of row 1 .* the first 5 .* are not padding. Give the `attention_mask`"
        with pytest.raises(ValueError, match=message):
            cache.show(byte_tokenizer(), input_ids, row=1)
        mask = (input_ids != 0).long()
        shown = cache.show(byte_tokenizer(), input_ids, row=1, attention_mask=mask)
        assert shown.tokens == byte_tokenizer().convert_ids_to_tokens([5, 6, 7])
        assert shown.num_layers_per_token == [0, 1, 0]
        # A prompt that is all padding, because the row began later.
        with pytest.raises(ValueError, match="Give the `attention_mask` as well"):
            cache.show(byte_tokenizer(), input_ids[:, :3], row=1)

        for mask, message in (
            ([[1] * 9] * 2, "`attention_mask` has 9 columns, but `input_ids` have 8"),
            ([[1] * 8] * 2, "shows 8 tokens of row 1 in 8 columns, but the cache has seen 3 in 8"),
            ([[0] * 6 + [1] * 2] * 2, "shows 2 tokens of row 1 in 8 columns, but the cache has seen 3 in 8"),
            ([[1] * 8], r"`attention_mask` are torch.int64 \(1, 8\), but the cache holds 2 rows"),
            ([[0.0] * 8] * 2, "`attention_mask` are torch.float32"),
        ):
            with pytest.raises(ValueError, match=message):
                cache.show(byte_tokenizer(), input_ids, row=1, attention_mask=torch.tensor(mask))


@pytest.mark.slow
def test_the_page_runs_and_prints_what_it_shows() -> None:
    page, names = PAGE.read_text(encoding="utf-8"), {}
    with contextlib.redirect_stdout(io.StringIO()) as output:
        for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
            exec(compile(code, str(PAGE), "exec"), names)
    texts = output.getvalue(), *re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    # What is kept may differ where torch rounds otherwise.
    counts, expected = ([int(n) for n in re.findall(r"\d+", text.partition(". 39")[0])] for text in texts)
    assert counts == pytest.approx(expected, abs=20)
    text, expected = (re.sub("[⟦⟧]", "", text).partition("\n")[2] for text in texts)
    assert text == expected
    assert len(names["recorder"].num_seen) == 40
