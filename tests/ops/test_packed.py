"""Decoding over packed heads, against a softmax in float64 over each head's tokens on their own."""

import itertools
from collections.abc import Callable

import exact
import pytest
import torch

from pyramid_cache.engine.ragged_store import PackedTokens, flat
from pyramid_cache.ops import decode_packed_attention
from pyramid_cache.ops.packed import decode_by_segments, segment_starts


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


def for_op(arguments: tuple) -> tuple:
    """The arguments with what the op takes instead of lengths."""
    lengths = arguments[3]
    return *arguments[:3], segment_starts(lengths, torch.device("cpu")), max(lengths), *arguments[4:]


def by_segments(
    *arguments,
    scaling: float,
    softcap: float | None = None,
    mask: torch.Tensor | None = None,
    packed_bias: torch.Tensor | None = None,
) -> tuple:
    return decode_by_segments(*arguments, scaling, softcap, mask, packed_bias)


def bias_of(arguments: tuple) -> torch.Tensor:
    return 2 * torch.randn(len(arguments[1]), generator=torch.Generator().manual_seed(1))


both_ways = pytest.mark.parametrize("decode", [decode_packed_attention, by_segments])


@both_ways
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_equals_softmax_head_by_head(dtype: torch.dtype, decode: Callable) -> None:
    for name in SHAPES:
        arguments = build(name, dtype)
        scaling = arguments[0].shape[-1] ** -0.5
        for softcap, bias in itertools.product((None, 1.5), (None, bias_of(arguments))):
            wanted = exact.packed_decode(*arguments, scaling, softcap, bias)
            found = decode(*for_op(arguments), scaling=scaling, softcap=softcap, packed_bias=bias)
            assert found[0].dtype == dtype and found[1].dtype == found[2].dtype == torch.float32
            for ours, theirs in zip(found, wanted, strict=True):
                torch.testing.assert_close(ours.double(), theirs, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@both_ways
def test_logits_beyond_the_range_of_exponentials(decode: Callable) -> None:
    arguments = [tensor * 40 if isinstance(tensor, torch.Tensor) else tensor for tensor in build("grouped")]
    found = decode(*for_op(arguments), scaling=1.0)
    assert all(tensor.isfinite().all() for tensor in found)
    torch.testing.assert_close(found[1].sum() + found[2].sum(), torch.tensor(12.0))


@both_ways
def test_room_behind_and_empty_slots_change_nothing(decode: Callable) -> None:
    """As in steps of fixed shapes: more packed tokens than segments have, a bound on them, and slots to come."""
    for name in SHAPES:
        arguments = for_op(build(name))
        query, packed_key, packed_value, starts, longest, key, value = arguments
        for softcap in (None, 1.5):
            options = {"scaling": 0.3, "softcap": softcap, "packed_bias": bias_of(arguments)}
            wanted = decode(*arguments, **options)
            options["packed_bias"] = torch.cat([options["packed_bias"], torch.randn(5)])
            room = [torch.cat([each, torch.randn(5, each.shape[1])]) for each in (packed_key, packed_value)]
            # An empty slot comes first, not last: the mask alone says which are empty.
            latest = [torch.cat([torch.randn_like(each[:, :, :1]), each], dim=2) for each in (key, value)]
            for heads in {1, key.shape[1]}:
                mask = (torch.arange(latest[0].shape[2]) >= 1).expand(key.shape[0], heads, -1)
                found = decode(query, *room, starts, longest + 9, *latest, mask=mask, **options)
                for ours, theirs in zip(
                    (found[0], found[1][: len(packed_key)], found[2][..., 1:]), wanted, strict=True
                ):
                    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
                assert not found[2][..., :1].any()


def test_gradients_are_those_of_the_definition() -> None:
    arguments = [tensor.double() if isinstance(tensor, torch.Tensor) else tensor for tensor in build("grouped")]
    bias = bias_of(arguments)
    tensors = [argument.requires_grad_() for argument in (*arguments, bias) if isinstance(argument, torch.Tensor)]
    found, wanted = (
        torch.autograd.grad(output.square().sum(), tensors)
        for output in (
            decode_packed_attention(*for_op(arguments), scaling=0.3, packed_bias=bias)[0],
            exact.packed_decode(*arguments, 0.3, None, bias)[0],
        )
    )
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_packed_tokens_know_where_their_segments_begin() -> None:
    is_kept = torch.tensor([[[1, 0, 1], [0, 0, 0]], [[1, 1, 1], [0, 1, 0]]], dtype=torch.bool)
    tokens = PackedTokens.of({"positions": torch.arange(12).view(2, 2, 3)}, is_kept)
    for same in (tokens, tokens.map_rows(lambda tensor: tensor)):
        assert flat(same.head_lengths) == [2, 0, 3, 1] and same.starts.tolist() == [0, 2, 2, 5, 6]
        assert same._per_token(torch.tensor([[[7]], [[9]]])).tolist() == [7, 7, 9, 9, 9, 9]
    moved = tokens.map_rows(lambda tensor: tensor[[1, 1, 0]])
    assert flat(moved.head_lengths) == [3, 1, 3, 1, 2, 0] and moved.starts.tolist() == [0, 3, 4, 7, 8, 10, 10]
    assert moved.tensors["positions"].tolist() == [6, 7, 8, 10, 6, 7, 8, 10, 0, 2]
    assert tokens.map_rows(lambda tensor: tensor[:0]).starts.tolist() == [0]


def test_shapes_that_do_not_fit() -> None:
    for changes, message in (
        ({1: torch.zeros(19, 8)}, r"`packed_value` must have the shape \(19, 6\), but has \(18, 6\)"),
        ({5: torch.zeros(2, 3, 0, 8), 6: torch.zeros(2, 3, 0, 6)}, "at least the token of the query"),
        ({0: torch.zeros(2, 4, 1, 8)}, "4 query heads cannot share 3 KV heads"),
        ({2: torch.zeros(18, 5)}, r"`packed_value` must have the shape \(18, 6\)"),
        ({1: torch.zeros(18, 8).half()}, "`packed_key` must be torch.float32, but is torch.float16"),
        ({2: torch.zeros(18, 6).half()}, "`packed_value` must be torch.float32"),
        ({3: torch.zeros(6, dtype=torch.int64)}, r"`starts` must have the shape \(7\), but has \(6,\)"),
        ({3: torch.zeros(7, dtype=torch.int32)}, "`starts` must be torch.int64, but is torch.int32"),
        ({7: torch.zeros(2, 2, 4, dtype=torch.bool)}, r"`mask` must have the shape \(2, 3 or 1, 4\)"),
        ({7: torch.zeros(2, 3, 4)}, "`mask` must be torch.bool"),
        ({8: torch.zeros(17)}, r"`packed_bias` must have the shape \(18\)"),
        ({8: torch.zeros(18).double()}, "`packed_bias` must be torch.float32"),
    ):
        arguments = [*for_op(build("grouped")), None, None]
        for index, value in changes.items():
            arguments[index] = value
        with pytest.raises(ValueError, match=message):
            decode_packed_attention(*arguments[:7], scaling=0.3, mask=arguments[7], packed_bias=arguments[8])
