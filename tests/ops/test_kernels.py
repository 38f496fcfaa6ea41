"""The Triton kernels of `triton_scores` and of `triton_decode` against float64 and against their specification."""

import exact
import pytest
import torch
from kernel_device import BF16, DEVICE, F16, F32, MARKS, assert_near, far_apart, on_gpu

from pyramid_cache.ops import reference, triton_decode, triton_scores


pytestmark = MARKS
NAN, INFINITY = float("nan"), float("inf")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers that are the same on every device."""
    return torch.randn(*shape).to(DEVICE, dtype)


def heads_last(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, laid out as `(batch, seq, heads, head_dim)`, with a gap between the rows."""
    batch, heads, length, width = tensor.shape
    storage = torch.full((batch, length, heads, width + 8), float("nan"), dtype=tensor.dtype, device=tensor.device)
    return storage[..., :width].transpose(1, 2).copy_(tensor)


def laid_out(options: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Or so that the numbers of one head of one token are far apart."""
    if "heads_last" in options:
        return [heads_last(tensor) for tensor in tensors]
    return [tensor.mT.contiguous().mT if "dims_first" in options else tensor for tensor in tensors]


@pytest.mark.parametrize(
    "case",
    [
        (F32, 2, 2, 37, 37, 64, ""),
        (F32, 6, 2, 33, 101, 96, "start weights heads_last"),
        (F32, 4, 1, 3, 5, 256, "softcap"),
        (F32, 2, 1, 17, 40, 40, "start dims_first softcap"),
        (F16, 3, 1, 1, 130, 80, "start"),
        (F16, 8, 2, 65, 200, 128, "weights start heads_last"),
        on_gpu((F16, 8, 1, 150, 150, 64, "softcap weights")),
        on_gpu((BF16, 8, 2, 150, 300, 128, "start weights heads_last")),
        on_gpu((BF16, 3, 1, 99, 99, 80, "softcap")),
        on_gpu((BF16, 4, 4, 300, 513, 256, "start")),
        on_gpu((BF16, 32, 8, 3000, 3001, 128, "start")),
        on_gpu((F32, 9, 3, 1500, 1500, 64, "weights")),
    ],
)
def test_scores(case: tuple) -> None:
    dtype, heads, kv_heads, rows, keys, head_dim, options = case
    query, key = random(2, heads, rows, head_dim, dtype=dtype), random(2, kv_heads, keys, head_dim, dtype=dtype)
    query, key = laid_out(options, query, key)
    key_start, key_mask = None, None
    if "start" in options:  # the second row of the batch has padding within the window of queries
        key_start = torch.tensor([keys // 4, keys - rows // 2 - 1], device=DEVICE, dtype=torch.int32)
        key_mask = torch.arange(keys, device=DEVICE) >= key_start[:, None]
    row_weights = random(1 if "heads_last" in options else 2, rows) if "weights" in options else None
    softcap, scaling = 5.0 if "softcap" in options else None, head_dim**-0.5
    allowed = exact.causal(rows, keys, key_mask, DEVICE)
    probabilities, lse = exact.attention(query, key, scaling, allowed, softcap)
    arguments = (query, key, lse.float(), row_weights, key_start, scaling, softcap)
    eager = None if dtype == F32 else reference.attention_scores(*arguments)
    wanted = exact.scores_of(probabilities, kv_heads, row_weights)
    assert_near(triton_scores.attention_scores(*arguments), wanted, eager)


def test_rows_that_do_not_count_add_nothing_whatever_they_hold() -> None:
    exact.check_rows_that_do_not_count(triton_scores.attention_scores, DEVICE)


@pytest.mark.parametrize(
    "case",
    [
        (F32, 2, 2, 1, 64, 64, ""),
        (F32, 6, 2, 333, 96, 64, "mask bias sinks"),
        (F32, 4, 2, 90, 64, 40, "softcap shared_mask dims_first high_sinks"),
        (F16, 4, 2, 70, 64, 64, "softcap shared_bias"),
        (F16, 3, 1, 257, 80, 256, "sinks softcap heads_last"),
        on_gpu((F32, 40, 1, 50, 64, 40, "softcap shared_mask dims_first")),
        on_gpu((F16, 8, 2, 1100, 128, 128, "shared_mask")),
        on_gpu((BF16, 8, 2, 1025, 128, 128, "mask bias sinks softcap")),
        on_gpu((BF16, 3, 3, 77, 256, 256, "")),
        on_gpu((BF16, 48, 1, 300, 96, 64, "shared_mask heads_last")),
        on_gpu((BF16, 32, 8, 70_001, 128, 128, "mask")),
        on_gpu((F32, 9, 3, 20_000, 64, 64, "shared_bias sinks")),
    ],
)
def test_decode(case: tuple) -> None:
    dtype, heads, kv_heads, slots, head_dim, value_dim, options = case
    query = 2 * random(2, heads, 1, head_dim, dtype=dtype)
    key, value = (random(2, kv_heads, slots, width, dtype=dtype) for width in (head_dim, value_dim))
    query, key, value = laid_out(options, query, key, value)
    mask = None
    if "mask" in options:
        mask = (torch.rand(2, 1 if "shared_mask" in options else kv_heads, slots) > 0.3).to(DEVICE)
        if "heads_last" in options:
            mask = mask.transpose(1, 2).contiguous().transpose(1, 2)
    # Slot by slot, and the heads of a slot side by side.
    of_heads = 1 if "shared_bias" in options else kv_heads
    bias = 2 * random(2, slots, of_heads).transpose(1, 2) if "bias" in options else None
    sinks = random(heads) if "sinks" in options else None
    if "high_sinks" in options:
        sinks += 500  # whose exponentials are no float32
    arguments = (query, key, value, mask, bias, sinks, head_dim**-0.5, 5.0 if "softcap" in options else None)
    found, eager = triton_decode.decode_attention(*arguments), reference.decode_in_float32(*arguments)
    for one, wanted, plain in zip(found, exact.decode(*arguments), eager, strict=True):
        assert one.dtype == plain.dtype
        assert_near(one, wanted, None if dtype == F32 else plain)


@pytest.mark.parametrize("head_blocks", [None, (16, 4, 2), on_gpu((128, 4, 2))])
def test_empty_slots_and_empty_heads(head_blocks: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = random(2, 6, 1, 64), random(2, 2, 200, 64), random(2, 2, 200, 64)
    mask = (torch.rand(2, 2, 200) > 0.5).to(DEVICE)
    mask[0, :, 20:150] = mask[1, 1] = False  # whole splits are empty, and a whole head
    if head_blocks is not None:
        monkeypatch.setitem(triton_decode.DECODE_BLOCKS, (4, 64), triton_decode.DecodeBlocks(*head_blocks))
    expected = exact.decode(query, key, value, mask, None, None, 0.125, None)
    empty = torch.where(torch.rand(2, 2, 200, 1) > 0.5, NAN, INFINITY).to(DEVICE)
    key, value = (torch.where(mask[..., None], tensor, empty) for tensor in (key, value))
    found = triton_decode.decode_attention(query, key, value, mask, None, None, 0.125, None)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    assert (found[0][1, :, 3:] == 0).all() and (found[1][1, 1] == 0).all()


def test_a_head_that_is_not_a_number_leaves_the_others_alone() -> None:
    query, key, value = random(2, 6, 1, 64), random(2, 2, 100, 64), random(2, 2, 100, 64)
    expected = triton_decode.decode_attention(query, key, value, None, None, None, 0.125, None)
    query[1, 4] = NAN
    found = triton_decode.decode_attention(query, key, value, None, None, None, 0.125, None)
    # The output of the head, and the probabilities of its group.
    for one, other, place in zip(found, expected, ((1, 0, 4), (1, 1)), strict=True):
        assert one[place].isnan().all()
        one[place] = other[place]
        assert torch.equal(one, other)


def test_strides_beyond_31_bits() -> None:
    far = far_apart(1, 1, 20, 64, stride=2**27 + 64)
    near = far.contiguous()
    lse = random(1, 1, 20)
    for layout in ((far, near), (near, far)):
        found = triton_scores.attention_scores(*layout, lse, None, None, 0.125, None)
        assert torch.equal(found, triton_scores.attention_scores(near, near, lse, None, None, 0.125, None))
    query = random(1, 2, 1, 64, dtype=F16)
    expected = triton_decode.decode_attention(query, near, near, None, None, None, 0.125, None)
    found = triton_decode.decode_attention(query, far, far, None, None, None, 0.125, None)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
