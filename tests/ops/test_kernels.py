"""The Triton kernels of `pyramid_cache.ops.triton_scores` against float64 and against their specification."""

import exact
import pytest
import torch
from kernel_device import BF16, DEVICE, F16, F32, IS_INTERPRETED, MARKS, assert_near, far_apart, on_gpu

from pyramid_cache.ops import reference, triton_scores


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
        (F16, 8, 2, 65, 200, 128, "weights start per_head heads_last"),
        on_gpu((F16, 8, 1, 150, 150, 64, "softcap weights")),
        on_gpu((BF16, 8, 2, 150, 300, 128, "start weights heads_last")),
        on_gpu((BF16, 3, 1, 99, 99, 80, "softcap per_head")),
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
    softcap, group_sum, scaling = (5.0 if "softcap" in options else None), "per_head" not in options, head_dim**-0.5
    allowed = exact.causal(rows, keys, key_mask, DEVICE)
    probabilities, lse = exact.attention(query, key, scaling, allowed, softcap)
    arguments = (query, key, lse.float(), row_weights, key_start, scaling, softcap, group_sum)
    eager = None if dtype == F32 else reference.attention_scores(*arguments)
    wanted = exact.scores_of(probabilities, kv_heads, row_weights, group_sum)
    assert_near(triton_scores.attention_scores(*arguments), wanted, eager)


def test_rows_that_do_not_count_add_nothing_whatever_they_hold() -> None:
    exact.check_rows_that_do_not_count(triton_scores.attention_scores, DEVICE)


@pytest.mark.parametrize(
    "case",
    [
        (F32, 2, 2, 1, 64, 64, ""),
        (F32, 6, 2, 333, 96, 64, "mask sinks"),
        (F32, 4, 2, 90, 64, 40, "softcap shared_mask dims_first high_sinks"),
        (F16, 3, 1, 257, 80, 256, "sinks softcap heads_last"),
        on_gpu((F32, 40, 1, 50, 64, 40, "softcap shared_mask dims_first")),
        on_gpu((F16, 8, 2, 1100, 128, 128, "shared_mask")),
        on_gpu((BF16, 8, 2, 1025, 128, 128, "mask sinks softcap")),
        on_gpu((BF16, 3, 3, 77, 256, 256, "")),
        on_gpu((BF16, 48, 1, 300, 96, 64, "shared_mask heads_last")),
        on_gpu((BF16, 32, 8, 70_001, 128, 128, "mask")),
        on_gpu((F32, 9, 3, 20_000, 64, 64, "sinks")),
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
    sinks = random(heads) if "sinks" in options else None
    if "high_sinks" in options:
        sinks += 500  # whose exponentials are no float32
    arguments = (query, key, value, mask, sinks, head_dim**-0.5, 5.0 if "softcap" in options else None)
    found, eager = triton_scores.decode_attention(*arguments), reference.decode_attention(*arguments)
    for one, wanted, plain in zip(found, exact.decode(*arguments), eager, strict=True):
        assert one.dtype == plain.dtype
        assert_near(one, wanted, None if dtype == F32 else plain)


@pytest.mark.parametrize("head_blocks", [None, (16, 4, 2), on_gpu((128, 4, 2))])
def test_empty_slots_and_empty_heads(head_blocks: tuple[int, ...] | None) -> None:
    query, key, value = random(2, 6, 1, 64), random(2, 2, 200, 64), random(2, 2, 200, 64)
    mask = (torch.rand(2, 2, 200) > 0.5).to(DEVICE)
    mask[0, :, 20:150] = mask[1, 1] = False  # whole splits are empty, and a whole head
    blocks = None if head_blocks is None else triton_scores.DecodeBlocks(*head_blocks)
    expected = exact.decode(query, key, value, mask, None, 0.125, None)
    empty = torch.where(torch.rand(2, 2, 200, 1) > 0.5, NAN, INFINITY).to(DEVICE)
    key, value = (torch.where(mask[..., None], tensor, empty) for tensor in (key, value))
    found = triton_scores.decode_attention(query, key, value, mask, None, 0.125, None, blocks=blocks)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    for empty_head, content in ((found[0][1, :, 3:], 0), (found[1][1, 3:], -INFINITY), (found[2][1, 1], 0)):
        assert (empty_head == content).all()


def test_a_head_that_is_not_a_number_leaves_the_others_alone() -> None:
    query, key, value = random(2, 6, 1, 64), random(2, 2, 100, 64), random(2, 2, 100, 64)
    expected = triton_scores.decode_attention(query, key, value, None, None, 0.125, None)
    query[1, 4] = NAN
    found = triton_scores.decode_attention(query, key, value, None, None, 0.125, None)
    # The output and log-sum-exp of the head, and the probabilities of its group.
    for one, other, place in zip(found, expected, ((1, 0, 4), (1, 4), (1, 1)), strict=True):
        assert one[place].isnan().all()
        one[place] = other[place]
        assert torch.equal(one, other)


def test_strides_beyond_31_bits() -> None:
    far = far_apart(1, 1, 20, 64, stride=2**27 + 64)
    near = far.contiguous()
    lse = random(1, 1, 20)
    for layout in ((far, near), (near, far)):
        found = triton_scores.attention_scores(*layout, lse, None, None, 0.125, None, True)
        assert torch.equal(found, triton_scores.attention_scores(near, near, lse, None, None, 0.125, None, True))
    query = random(1, 2, 1, 64, dtype=F16)
    expected = triton_scores.decode_attention(query, near, near, None, None, 0.125, None)
    found = triton_scores.decode_attention(query, far, far, None, None, 0.125, None)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

    new = random(1, 1, 1, 64, dtype=F16)
    slots = torch.full((1, 1, 1), 18, device=DEVICE)
    number = torch.full((1, 1, 1), 30, dtype=torch.int32, device=DEVICE)
    positions, scores = torch.arange(20, dtype=torch.int32, device=DEVICE).view(1, 1, 20), random(1, 1, 20)
    triton_scores.decode_attention_and_evict(
        query, new, new, slots, number, number, None, None, far, near, positions, scores, 0.125, None, True
    )
    assert torch.equal(far[:, :, 18:19], new)
    assert torch.equal(near[:, :, 18:19], new)
    untouched = [*range(18), 19]
    assert torch.equal(far[:, :, untouched], near[:, :, untouched])


def new_cache(kv_heads: int, slots: int, head_dim: int, value_dim: int, dtype, num_empty: int) -> tuple[list, list]:
    """Keys, values, positions and scores of a batch of 2, as views, and the larger tensors that they are cut from."""
    torch.manual_seed(slots)
    order = torch.rand(2, kv_heads, slots).argsort(dim=-1)
    storages = [
        random(2, slots + 3, kv_heads + 1, head_dim, dtype=dtype),
        random(2, kv_heads, slots + 3, value_dim + 5, dtype=dtype),
        torch.full((2, kv_heads + 1, slots, 2), -7, dtype=torch.int32, device=DEVICE),
        random(slots + 3, 2, kv_heads),
    ]
    positions = storages[2][:, 1:, :, 1].copy_((order - num_empty).clamp_min(-1))
    key, value = storages[0][:, 2:-1, 1:].transpose(1, 2), storages[1][:, :, 1:-2, 3:-2]
    return [key, value, positions, storages[3][3:].permute(1, 2, 0)], storages


def search_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short caches find the victim as long ones do: not one program for all slots of a head, but one for each tile."""
    monkeypatch.setattr(triton_scores, "MAX_SLOTS_OF_ONE_PROGRAM", 0)
    monkeypatch.setattr(triton_scores, "num_multiprocessors", lambda device: 16)


@pytest.mark.parametrize(
    "case",
    [
        (F32, 1, 2, 45, 64, 64, 1, "tiles"),
        (F32, 4, 1, 70, 32, 80, 9, "sinks evicts"),
        (F16, 3, 1, 83, 64, 32, 5, "softcap tiles"),
        (F16, 20, 1, 33, 64, 64, 1, "sinks"),
        on_gpu((BF16, 4, 2, 2100, 128, 128, 50, "evicts")),
        on_gpu((BF16, 4, 2, 2100, 128, 128, 50, "evicts tiles")),
        on_gpu((BF16, 8, 1, 700, 256, 64, 1, "softcap sinks")),
    ],
)
def test_steps_of_eviction(case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, group, kv_heads, slots, head_dim, value_dim, num_empty, options = case
    if "tiles" in options:
        search_tile_by_tile(monkeypatch)
    sizes = kv_heads, slots, head_dim, value_dim
    (found, storages), (expected, _) = (new_cache(*sizes, one, num_empty) for one in (dtype, F32))
    is_empty = (found[2] < 0)[..., None]
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        # The specification multiplies what empty slots hold by zero.
        theirs.copy_(ours.masked_fill(is_empty, 0.0))
        ours.masked_fill_(is_empty, NAN)
    sinks = random(kv_heads * group) if "sinks" in options else None
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == F32 else {"rtol": 1e-2, "atol": 1e-2}
    # The interpreter takes as long for one head as for all of a group.
    num_steps, period = (40, 10) if not IS_INTERPRETED else (5 if group <= 16 else 2, 5)
    for step in range(num_steps):
        # At times all of a row is recent, and at times it is told not to evict: it fills a slot more each time.
        num_recent = torch.tensor([3, 9999 if num_empty >= 5 and step % period == 3 else 0], dtype=torch.int32)
        tensors = (
            random(2, kv_heads * group, 1, head_dim, dtype=dtype),
            heads_last(random(2, kv_heads, 1, head_dim, dtype=dtype)),
            random(2, kv_heads, 1, value_dim, dtype=dtype),
        )
        given = (
            (found[2] < 0).int().argmax(dim=-1, keepdim=True),
            torch.full((2, 1, 1), slots - num_empty + step + 1, dtype=torch.int32, device=DEVICE),
            num_recent.view(2, 1, 1).to(DEVICE),
            torch.tensor([True, step % period != 4], device=DEVICE) if "evicts" in options else None,
            sinks,
        )
        rest = 0.2, 4.0 if "softcap" in options else None, num_empty > 1 or step % 2 == 0
        output, lse, victims = triton_scores.decode_attention_and_evict(*tensors, *given, *found, *rest)
        exact_tensors = (tensor.float() for tensor in tensors)
        wanted = reference.decode_attention_and_evict(*exact_tensors, *given, *expected, *rest)
        is_evicted, is_held = expected[2].gather(2, wanted[2]) < 0, expected[2] >= 0
        assert torch.equal(victims[is_evicted], wanted[2][is_evicted])
        assert torch.equal(found[2], expected[2])
        torch.testing.assert_close(output.float(), wanted[0], **tolerance)
        torch.testing.assert_close(lse, wanted[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[3][is_held], expected[3][is_held], rtol=1e-5, atol=2e-5)
        for ours, theirs in zip(found[:2], expected[:2], strict=True):
            assert torch.equal(ours[is_held].float(), theirs[is_held])
    # What lies beside the views is as it was.
    views, fresh = new_cache(*sizes, dtype, num_empty)
    for view in (*found, *views):
        view.zero_()
    assert all(map(torch.equal, storages, fresh))


VICTIMS = [
    ("of equals the oldest", [3, 2, 2, 5, 9], [4, 9, 7, 1, 2], 2),
    ("all equal", [7, 7, 7, 7, 7], [4, 9, 7, 1, 2], 3),
    ("zeros of both signs are equal", [0.0, -0.0, 1, 1, 1], [8, 9, 1, 2, 3], 0),
    ("negative", [1, -1e-30, -2, -1.5, 0], [5, 4, 3, 2, 1], 2),
    ("minus infinity", [INFINITY, 4, -INFINITY, 2, 1], [1, 2, 3, 4, 5], 2),
    ("plus infinity", [INFINITY] * 5, [5, 4, 3, 2, 1], 4),
    ("one is not a number: the oldest of all", [3, 2, NAN, 5, 1], [4, 9, 7, 1, 2], 3),
    ("two are not a number", [3, -NAN, NAN, 5, 1], [4, 9, 7, 1, 2], 3),
    ("a recent one is not a number", [3, 2, NAN, 5, 1], [4, 9, 98, 1, 2], 4),
    ("an empty one is not a number", [3, 2, NAN, 5, 1], [4, 9, -1, 1, 2], 4),
    ("neither empty nor recent", [-3, 2, -9, 5, 1], [-1, 9, 99, 1, 2], 4),
    ("all recent", [3, 2, 1, 5, 1], [97, -1, 98, 99, -1], None),
]


@pytest.mark.parametrize("way", ["one program", "tiles"])
def test_victims_by_hand(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "tiles":
        search_tile_by_tile(monkeypatch)
    # All cases are KV heads of one call. The new token, at position 100 in slot 5, draws all attention: what the
    # others have stays as it is.
    heads = len(VICTIMS)
    query = torch.ones(1, 2 * heads, 1, 64, device=DEVICE)
    key, value = torch.full((1, heads, 6, 64), -100.0, device=DEVICE), random(1, heads, 6, 64)
    new_value = random(1, heads, 1, 64)
    position = torch.tensor([[[*held, 50] for _, _, held, _ in VICTIMS]], dtype=torch.int32, device=DEVICE)
    score = torch.tensor([[[*scores, NAN] for _, scores, _, _ in VICTIMS]], dtype=torch.float32, device=DEVICE)
    next_position, num_recent = (torch.full((1, 1, 1), n, dtype=torch.int32, device=DEVICE) for n in (101, 4))
    output, lse, victims = triton_scores.decode_attention_and_evict(
        query, -key[:, :, :1], new_value, torch.full((1, heads, 1), 5, device=DEVICE), next_position, num_recent, None,
        None, key, value, position, score, 1.0, None, True,
    )  # fmt: skip
    for head, (name, scores, held, victim) in enumerate(VICTIMS):
        expected = [*held, 100]
        if victim is not None:
            assert victims[0, head].item() == victim, name
            expected[victim] = -1
        assert position[0, head].tolist() == expected, name
        wanted = torch.tensor([*scores, 2.0])
        torch.testing.assert_close(score[0, head].cpu(), wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(output, new_value.repeat_interleave(2, dim=1).transpose(1, 2))
    assert torch.equal(lse, torch.full((1, 2 * heads), 6400.0, device=DEVICE))
