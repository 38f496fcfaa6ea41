"""The Triton kernels of `pyramid_cache.ops.triton_decode` against a softmax in float64."""

from itertools import product

import exact
import pytest
import torch
from kernel_device import BF16, DEVICE, F16, F32, IS_INTERPRETED, MARKS, assert_near, far_apart, on_gpu

from pyramid_cache.ops import packed, triton_decode
from pyramid_cache.ops.packed import decode_one_by_one, segment_starts
from pyramid_cache.ops.triton_decode import DECODE_BLOCKS, MAX_SPLITS, DecodeBlocks


pytestmark = MARKS


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers that are the same on every device, as a slice of something larger whose other numbers are NaN."""
    storage = torch.full((*shape[:-2], shape[-2] + 3, shape[-1] + 8), float("nan"), dtype=dtype, device=DEVICE)
    return storage[..., 2:-1, : shape[-1]].copy_(torch.randn(*shape))


def arguments_of(
    dtype: torch.dtype, lengths: list[int], group: int, head_dim: int, value_dim: int, latest: int, batch: int = 1
) -> tuple:
    kv_heads = len(lengths) // batch
    return (
        random(batch, kv_heads * group, 1, head_dim, dtype=dtype),
        random(sum(lengths), head_dim, dtype=dtype),
        random(sum(lengths), value_dim, dtype=dtype),
        lengths,
        random(batch, kv_heads, latest, head_dim, dtype=dtype),
        random(batch, kv_heads, latest, value_dim, dtype=dtype),
    )


def for_op(arguments: tuple, device: str = DEVICE) -> tuple:
    """The arguments with what the op takes instead of lengths."""
    query, packed_key, packed_value, lengths, *latest = arguments
    return query, packed_key, packed_value, segment_starts(lengths, torch.device(device)), max(lengths), *latest


def run(
    arguments: tuple, scaling: float, softcap: float | None = None, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Fills what `torch.empty` gives with NaN: it is seen if something is read that was not written."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        return triton_decode.decode_packed_attention(*for_op(arguments), scaling, softcap, None, bias)
    finally:
        torch.use_deterministic_algorithms(False)


def check(
    found: tuple[torch.Tensor, ...],
    arguments: tuple,
    scaling: float,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    """Tensor cores, which add half precision, cut a digit off sums; only the output is rounded to the dtype."""
    dtype, eager = arguments[0].dtype, None
    if dtype != F32:
        on_cpu = tuple(one.cpu() if isinstance(one, torch.Tensor) else one for one in arguments)
        bias_on_cpu = None if bias is None else bias.cpu()
        eager = decode_one_by_one(*for_op(on_cpu, "cpu"), scaling, softcap, None, bias_on_cpu)[0].to(DEVICE)
    assert [one.dtype for one in found] == [dtype, F32, F32]
    wanted = exact.packed_decode(*arguments, scaling, softcap, bias)
    for one, other, plain in zip(found, wanted, (eager, None, None), strict=True):
        assert_near(one, other, plain, rtol=3e-6 if dtype == F32 else 1e-5)


@pytest.mark.parametrize(
    "case",
    [
        (F32, 2, [0, 333, 70, 1], 1, 64, 64, 1, ""),
        (F32, 2, [0, 0, 0, 0], 8, 64, 64, 3, ""),
        (F32, 2, [400, 3], 3, 256, 80, 70, "bias heads_last"),
        (F32, 1, [130], 20, 64, 40, 2, "softcap"),
        (F16, 1, [257, 90, 31, 64], 3, 96, 256, 33, "bias softcap heads_last"),
        on_gpu((F16, 1, [1100, 10], 4, 128, 128, 5, "")),
        on_gpu((BF16, 2, [1025, 0, 77, 300], 3, 128, 128, 40, "bias softcap")),
        on_gpu((BF16, 2, [999, 64], 8, 64, 256, 3, "heads_last")),
        on_gpu((BF16, 1, [70_001, 3, 0, 9000, 20_000, 1, 12, 500], 4, 128, 128, 64, "")),
        on_gpu((F32, 1, [30_000, 64, 7000], 3, 64, 64, 9, "bias")),
    ],
)
def test_decode(case: tuple) -> None:
    dtype, batch, lengths, group, head_dim, value_dim, latest, options = case
    arguments = list(arguments_of(dtype, lengths, group, head_dim, value_dim, latest, batch))
    arguments[0] *= 2
    if "heads_last" in options:
        # The same numbers, laid out as `(batch, dim, tokens, heads)`.
        arguments[4:] = (states.transpose(1, 3).contiguous().transpose(1, 3) for states in arguments[4:])
    scaling, softcap = head_dim**-0.5, 5.0 if "softcap" in options else None
    bias = 2 * random(sum(lengths), 1, dtype=F32)[:, 0] if "bias" in options else None
    check(run(tuple(arguments), scaling, softcap, bias), tuple(arguments), scaling, softcap, bias)


@pytest.mark.parametrize("heads", [1, 2])
def test_room_behind_and_empty_slots_change_nothing(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in steps of fixed shapes. Room and empty slots hold NaN keys, room biases; only values must be finite."""
    monkeypatch.setitem(DECODE_BLOCKS, (4, 64), DecodeBlocks(16, num_warps=4, num_stages=2))
    query, *packed_states, lengths, key, value = arguments_of(F32, [0, 90, 17, 40], 2, 16, 16, 5, batch=2)
    bias = random(147, 1, dtype=F32)[:, 0]
    wanted = run((query, *packed_states, lengths, key, value), 0.25, None, bias)
    bias = torch.cat([bias, bias.new_full((70,), float("nan"))])
    room = [torch.cat([each, each.new_full((70, 16), float("nan"))]) for each in packed_states]
    latest = [torch.cat([each, each.new_zeros(2, 2, 40, 16), each[:, :, :2]], dim=2) for each in (key, value)]
    latest = [each[:, :, [*range(5, 45), 0, 1, 2, 3, 4, 45, 46]] for each in latest]
    mask = torch.zeros(2, heads, 47, dtype=torch.bool, device=DEVICE)
    mask[..., 40:45] = True
    starts = segment_starts(lengths, torch.device(DEVICE))
    output, packed_sums, sums = triton_decode.decode_packed_attention(
        query, *room, starts, 130, *latest, 0.25, None, mask, bias
    )
    for one, other in zip((output, packed_sums[:147], sums[..., 40:45]), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    assert not sums[..., :40].any() and not sums[..., 45:].any()


def test_any_number_of_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = arguments_of(F32, [0, 400, 17, 40], 2, 16, 16, 30)
    monkeypatch.setitem(DECODE_BLOCKS, (4, 64), DecodeBlocks(16, num_warps=4, num_stages=2))
    kernel, grids = triton_decode.attend_kernel, []

    class RecordedGrids:
        """The kernel, whose grids are appended to a list."""

        def __getitem__(self, grid: tuple[int, ...]):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(triton_decode, "attend_kernel", RecordedGrids())
    # Tiles of 16. For one program nothing is cut. Of 16, half are set aside for parts that are not full: the others
    # have 577 / 8 tokens each, which are 5 tiles. For 20,000 every tile is a part of its own.
    for multiprocessors, num_splits in ((1, 1 + 1), (8, 1 + 5), (10_000, 2 + 25))[: 2 if IS_INTERPRETED else 3]:
        monkeypatch.setattr(triton_decode, "num_multiprocessors", lambda device, number=multiprocessors: number)
        check(run(arguments, 0.25), arguments, 0.25)
        assert grids.pop() == (4 * num_splits,)


def test_parts_share_the_device() -> None:
    cases = [([0], 1), ([17] * 64, 16), ([200_000, 0, 3, 9], 64), ([3000, 500, 0, 1777] * 2, 40), ([10**8] * 8, 5000)]
    for (lengths, latest), num_chunks, multiprocessors in product(cases, [1, 3], [1, 8, 108, 132]):
        size = 64 * triton_decode.part_tiles(
            sum(lengths), max(lengths), latest, len(lengths), num_chunks, 64, multiprocessors
        )
        parts = [-(-length // size) + -(-latest // size) for length in lengths]
        assert max(parts) <= MAX_SPLITS
        at_once = 2 * multiprocessors // num_chunks
        if at_once >= 4 * len(lengths):
            # All at the same time, and enough of them, unless single tiles or the merge are the limit.
            assert sum(parts) <= at_once
            assert size == 64 or max(parts) >= MAX_SPLITS - 2 or sum(parts) >= at_once / 3


def test_a_segment_that_is_not_a_number_leaves_the_others_alone() -> None:
    arguments = arguments_of(F32, [40, 70, 100, 0], 2, 64, 64, 9, batch=2)
    expected = run(arguments, 0.125)
    arguments[1][40:110] = float("nan")  # the second of four segments
    output, packed_sums, latest_sums = run(arguments, 0.125)
    assert output[0, 0, 2:].isnan().all() and packed_sums[40:110].isnan().all() and latest_sums[0, 1].isnan().all()
    assert torch.equal(output[0, 0, :2], expected[0][0, 0, :2]) and torch.equal(output[1], expected[0][1])
    assert torch.equal(packed_sums[:40], expected[1][:40]) and torch.equal(packed_sums[110:], expected[1][110:])
    assert torch.equal(latest_sums[0, 0], expected[2][0, 0]) and torch.equal(latest_sums[1], expected[2][1])


def test_logits_of_minus_infinity_and_beyond_exponentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DECODE_BLOCKS, (4, 64), DecodeBlocks(16, num_warps=4, num_stages=2))
    arguments = arguments_of(F32, [300, 5], 2, 64, 64, 9)
    query, packed_key = arguments[:2]
    query *= 40
    query[..., 0] = 1.0
    packed_key[:150, 0] = float("-inf")  # whole parts of the first segment
    packed_key[300:305, 0] = float("-inf")  # all that the second packs
    found = run(arguments, 1.0)
    assert (found[1][:150] == 0).all() and (found[1][300:] == 0).all()
    for one, other in zip(found, exact.packed_decode(*arguments, 1.0), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)  # of logits of about a thousand


def test_strides_beyond_31_bits() -> None:
    """Packed tokens of which the second segment begins more than 2**31 elements behind the first."""
    far = far_apart(20, 64, stride=2**27 + 64)
    arguments = list(arguments_of(F16, [18, 2], 2, 64, 64, 3))
    expected = run(tuple(arguments), 0.125)
    for index in (1, 2):
        near = arguments[index]
        far.copy_(near)
        arguments[index] = far
        for one, other in zip(run(tuple(arguments), 0.125), expected, strict=True):
            assert torch.equal(one, other)
        arguments[index] = near


def test_what_the_kernels_do_not_take() -> None:
    arguments = arguments_of(F32, [3, 0], 1, 8, 8, 2)
    doubles = tuple(one.double() if isinstance(one, torch.Tensor) else one for one in arguments)
    output, _, _ = packed._on_cuda(*for_op(doubles), 0.3, None, None, None)
    torch.testing.assert_close(output, exact.packed_decode(*doubles, 0.3)[0], rtol=1e-5, atol=1e-5)
