"""Decoding over packed heads, against a softmax in float64 over each head's tokens on their own."""

import exact
import pytest
import torch

from pyramid_cache.caches.adakv.ragged_store import PackedTokens, flat
from pyramid_cache.ops import decode_packed_attention, packed
from pyramid_cache.ops.packed import decode_padded, segment_starts


# Rows x KV heads, the lengths of their segments, query heads per KV head, widths of keys and values, latest tokens.
SHAPES = {
    "grouped": (2, 3, [3, 0, 7, 1, 5, 2], 2, 8, 6, 4),
    "one_head": (1, 1, [33], 1, 16, 16, 1),
    "nothing_packed": (1, 2, [0, 0], 3, 8, 8, 2),
    "many_queries": (3, 2, [40, 1, 17, 90, 2, 2], 7, 32, 48, 31),
}
# What float32 sums and half precision products may be off by.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple:
    batch, kv_heads, lengths, group, head_dim, value_dim, latest = SHAPES[name]
    generator = torch.Generator().manual_seed(0)

    def states(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    query = states(batch, kv_heads * group, 1, head_dim)
    of_all = states(sum(lengths), head_dim), states(sum(lengths), value_dim)
    return query, *of_all, lengths, *(states(batch, kv_heads, latest, width) for width in (head_dim, value_dim))


def starts_of(arguments: tuple) -> torch.Tensor:
    return segment_starts(arguments[3], torch.device("cpu"))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_equals_softmax_head_by_head(dtype: torch.dtype) -> None:
    for name in SHAPES:
        arguments = build(name, dtype)
        scaling = arguments[0].shape[-1] ** -0.5
        for softcap in (None, 1.5):
            wanted = exact.packed_decode(*arguments, scaling, softcap)
            for found in (
                decode_packed_attention(*arguments, scaling=scaling, softcap=softcap),
                decode_padded(*arguments, scaling, softcap, starts_of(arguments)),
            ):
                assert found[0].dtype == dtype and found[1].dtype == found[2].dtype == torch.float32
                for ours, theirs in zip(found, wanted, strict=True):
                    torch.testing.assert_close(ours.double(), theirs, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


def test_logits_beyond_the_range_of_exponentials() -> None:
    arguments = [tensor * 40 if isinstance(tensor, torch.Tensor) else tensor for tensor in build("grouped")]
    for found in (
        decode_packed_attention(*arguments, scaling=1.0),
        decode_padded(*arguments, 1.0, None, starts_of(arguments)),
    ):
        assert all(tensor.isfinite().all() for tensor in found)
        torch.testing.assert_close(found[1].sum() + found[2].sum(), torch.tensor(12.0))


def test_gradients_are_those_of_the_definition() -> None:
    arguments = [tensor.double() if isinstance(tensor, torch.Tensor) else tensor for tensor in build("grouped")]
    tensors = [argument.requires_grad_() for argument in arguments if isinstance(argument, torch.Tensor)]
    found, wanted = (
        torch.autograd.grad(output.square().sum(), tensors)
        for output in (
            decode_packed_attention(*arguments, scaling=0.3)[0],
            exact.packed_decode(*arguments, 0.3)[0],
        )
    )
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_starts_that_are_given_are_those_that_would_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step whose starts are given does not send its lengths to the device."""
    arguments = build("grouped")
    assert starts_of(arguments).tolist() == [0, 3, 3, 10, 11, 16, 18]
    arguments[0].requires_grad_()
    wanted = decode_packed_attention(*arguments, scaling=0.3)
    given = starts_of(arguments)
    monkeypatch.setattr(packed, "segment_starts", None)
    found = decode_packed_attention(*arguments, scaling=0.3, starts=given)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_packed_tokens_know_where_their_segments_begin() -> None:
    is_kept = torch.tensor([[[1, 0, 1], [0, 0, 0]], [[1, 1, 1], [0, 1, 0]]], dtype=torch.bool)
    tokens = PackedTokens.of({"positions": torch.arange(12).view(2, 2, 3)}, is_kept)
    for same in (tokens, tokens.map_rows(lambda tensor: tensor)):
        assert flat(same.head_lengths) == [2, 0, 3, 1] and same.starts.tolist() == [0, 2, 2, 5, 6]
    moved = tokens.map_rows(lambda tensor: tensor[[1, 1, 0]])
    assert flat(moved.head_lengths) == [3, 1, 3, 1, 2, 0] and moved.starts.tolist() == [0, 3, 4, 7, 8, 10, 10]
    assert moved.tensors["positions"].tolist() == [6, 7, 8, 10, 6, 7, 8, 10, 0, 2]
    assert tokens.map_rows(lambda tensor: tensor[:0]).starts.tolist() == [0]


def test_shapes_that_do_not_fit() -> None:
    for changes, message in (
        ({3: [3, 0, 7]}, "`lengths` has 3 numbers for 2 rows of 3 KV heads"),
        ({3: [3, 0, 7, 1, 5, 3]}, r"`packed_key` must have the shape \(19, 8\), but has \(18, 8\)"),
        ({4: torch.zeros(2, 3, 0, 8), 5: torch.zeros(2, 3, 0, 6)}, "at least the token of the query"),
        ({0: torch.zeros(2, 4, 1, 8)}, "4 query heads cannot share 3 KV heads"),
        ({2: torch.zeros(18, 5)}, r"`packed_value` must have the shape \(18, 6\)"),
        ({1: torch.zeros(18, 8).half()}, "`packed_key` must be torch.float32, but is torch.float16"),
        ({2: torch.zeros(18, 6).half()}, "`packed_value` must be torch.float32"),
        ({6: torch.zeros(6, dtype=torch.int64)}, r"`starts` must have the shape \(7\), but has \(6,\)"),
        ({6: torch.zeros(7, dtype=torch.int32)}, "`starts` must be torch.int64, but is torch.int32"),
    ):
        arguments = [*build("grouped"), None]
        for index, value in changes.items():
            arguments[index] = value
        with pytest.raises(ValueError, match=message):
            decode_packed_attention(*arguments[:6], scaling=0.3, starts=arguments[6])
