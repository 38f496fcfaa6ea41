"""The Triton kernel of `pyramid_cache.ops.triton_quantized` against a softmax in float64 over restored slots."""

from typing import Any

import exact
import pytest
import torch
from kernel_device import BF16, DEVICE, F16, F32, MARKS, assert_near, on_gpu

from pyramid_cache.engine.quantization import Quantizer
from pyramid_cache.ops import reference, triton_quantized
from pyramid_cache.ops.quantized import Coded
from pyramid_cache.ops.triton_decode import DecodeBlocks
from pyramid_cache.ops.triton_quantized import CODE_BLOCKS


pytestmark = MARKS
NAN = float("nan")
FAR = 2**25  # tokens of 64 bytes


def random(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    """Normal numbers that are the same on every device."""
    return torch.randn(*shape).to(DEVICE, dtype)


def states_of(
    quantizer: Quantizer, dtype: torch.dtype, group: int, widths: tuple[int, int], old: int, latest: int
) -> tuple:
    """Two rows of two KV heads: a query, codes of keys and values, how many slots these are, and the latest states."""
    query = 2 * random(2, 2 * group, 1, widths[0], dtype=dtype)
    coded = (
        quantizer.coded(name, *quantizer.stored(name, random(2, 2, old, width, dtype=dtype) + 1))
        for name, width in zip(("keys", "values"), widths, strict=True)
    )
    return query, *coded, old, *(random(2, 2, latest, width, dtype=dtype) for width in widths)


def slots_of(states: tuple) -> list[torch.Tensor]:
    """All keys and all values, restored."""
    _, keys, values, _, *latest = states
    return [
        torch.cat([coded.restored(F32), each.float()], dim=2)
        for coded, each in zip((keys, values), latest, strict=True)
    ]


def run(states: tuple, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Fills what `torch.empty` gives with NaN: it is seen if something is read that was not written."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        return triton_quantized.decode_quantized_attention(*states, *rest)
    finally:
        torch.use_deterministic_algorithms(False)


def check(
    found: tuple[torch.Tensor, torch.Tensor],
    states: tuple,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    starts: None,
    scaling: float,
    softcap: float | None,
) -> None:
    """Half precision may be twice as far off as plain PyTorch over slots that are restored in that dtype."""
    query, dtype, eager = states[0], states[0].dtype, (None, None)
    rest = mask, bias, sinks, scaling, softcap
    if dtype != F32:
        eager = reference.decode_attention(query, *(each.to(dtype) for each in slots_of(states)), *rest)
    assert [one.dtype for one in found] == [dtype, F32]
    for one, wanted, plain in zip(found, exact.decode(query, *slots_of(states), *rest), eager, strict=True):
        assert_near(one, wanted, plain)


@pytest.mark.parametrize(
    "case",
    [
        (F32, "int8", 0, 2, (64, 64), 75, 9, ""),
        (F32, "fp8", 0, 1, (128, 80), 33, 1, "mask bias"),
        (F32, "kivi4", 0, 3, (64, 128), 130, 41, "mask sinks softcap"),
        (F32, "kivi4", 0, 20, (80, 96), 64, 3, "bias"),
        (F32, "kivi2", 0, 2, (128, 64), 31, 70, "shared bias"),
        (F32, "kivi2", 0, 2, (80, 80), 97, 5, "sinks"),
        (F32, "int8", 16, 2, (80, 64), 96, 5, ""),
        (F32, "fp8", 48, 1, (64, 64), 96, 5, "mask"),
        (F32, "kivi4", 32, 4, (128, 128), 96, 33, "mask bias"),
        (F32, "kivi2", 32, 2, (64, 80), 64, 17, "softcap"),
        (F16, "kivi4", 0, 4, (128, 128), 70, 9, "shared mask"),
        (F16, "fp8", 32, 2, (64, 64), 64, 9, ""),
        *(
            on_gpu((dtype, format_name, channel_group, 4, (width, width), 4096 + 32, 100, "mask bias"))
            for dtype in (BF16, F16)
            for format_name in ("int8", "fp8", "kivi4", "kivi2")
            for channel_group in (0, 32)
            for width in (64, 80, 128)
        ),
        on_gpu((BF16, "kivi4", 0, 4, (128, 128), 70_001, 159, "shared mask softcap")),
        on_gpu((BF16, "kivi2", 64, 24, (256, 256), 12_800, 159, "")),
    ],
)
def test_decode(case: tuple) -> None:
    dtype, format_name, channel_group, group, widths, old, latest, options = case
    states = states_of(Quantizer(format_name, 4, channel_group), dtype, group, widths, old, latest)
    heads = 1 if "shared" in options else 2
    mask = (torch.rand(2, heads, old + latest) > 0.3).to(DEVICE) if "mask" in options else None
    # Slot by slot, and the heads of a slot side by side.
    bias = 2 * random(2, old + latest, heads).transpose(1, 2) if "bias" in options else None
    sinks = random(2 * group) if "sinks" in options else None
    rest = mask, bias, sinks, None, widths[0] ** -0.5, 5.0 if "softcap" in options else None
    check(run(states, *rest), states, *rest)


@pytest.mark.parametrize("format_name, multiprocessors", [("int8", 1), ("kivi4", 4), ("fp8", 10_000)])
def test_packed_heads_in_any_number_of_parts(
    format_name: str, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads of a row one behind the other, of which one holds nothing; what lies behind them is NaN."""
    monkeypatch.setattr(triton_quantized, "num_multiprocessors", lambda device: multiprocessors)
    monkeypatch.setitem(CODE_BLOCKS, (4, 128), DecodeBlocks(16, num_warps=4, num_stages=2))
    lengths = torch.tensor([[75, 0], [20, 64]])
    states = states_of(Quantizer(format_name, 4), F32, 2, (64, 80), 75, 9)
    query, keys, values, old, *latest = states
    is_token = (torch.arange(old) < lengths[..., None]).to(DEVICE)

    def packed(coded: Coded) -> Coded:
        tensors = []
        for slots, fill in zip(coded[:2], (255, NAN), strict=True):
            tensors.append(slots.new_full((2, 1, 90, slots.shape[-1]), fill))
            for row, is_held in enumerate(is_token):
                tensors[-1][row, 0, : int(is_held.sum())] = slots[row][is_held]
        return Coded(*tensors, *coded[2:])

    starts = torch.nn.functional.pad(lengths.cumsum(dim=-1), (1, 0)).to(DEVICE)
    mask = torch.cat([is_token, is_token.new_ones(2, 2, 9)], dim=-1)
    mask[:, 0, 80] = False
    found = run((query, packed(keys), packed(values), old, *latest), mask, None, None, starts, 0.125, None)
    check(found, states, mask, None, None, None, 0.125, None)


def test_empty_heads_get_zeros() -> None:
    states = states_of(Quantizer("kivi4", 4), F32, 2, (64, 64), 70, 5)
    mask = torch.zeros(2, 2, 75, dtype=torch.bool, device=DEVICE)
    mask[0, 1, 66:] = True
    found = run(states, mask, None, None, None, 0.125, None)
    check(found, states, mask, None, None, None, 0.125, None)
    assert not found[0][1].any() and not found[1][1].any()


def test_codes_beyond_31_bits() -> None:
    """The codes of a head begin 2**31 bytes behind the first ones. Only what is used is touched."""
    states = states_of(Quantizer("int8", 4), F32, 1, (64, 64), 40, 3)
    query, keys, values, old, *latest = states
    one_head = (
        query[:1, :1],
        *(each._replace(codes=each.codes[:1, :1], scales=each.scales[:1, :1]) for each in states[1:3]),
    )
    one_head = *one_head, old, *(each[:1, :1] for each in latest)
    far = []
    for coded in one_head[1:3]:
        try:
            tensors = [each.new_empty(1, 1, FAR + old, each.shape[-1]) for each in coded[:2]]
        except RuntimeError as error:
            pytest.skip(f"needs a GPU: there is no room for so many addresses ({error})")
        for tensor, each in zip(tensors, coded[:2], strict=True):
            tensor[:, :, FAR:] = each
        far.append(Coded(*tensors, *coded[2:]))
    starts = torch.tensor([[FAR, FAR + old]], device=DEVICE)
    rest = None, None, None
    found = triton_quantized.decode_quantized_attention(
        query[:1, :1], *far, old, *one_head[4:], *rest, starts, 0.1, None
    )
    check(found, one_head, *rest, None, 0.1, None)


def test_groups_that_no_step_is_within() -> None:
    """Of 24 tokens. Plain PyTorch restores them tile by tile."""
    states = states_of(Quantizer("kivi4", 4, 24), F32, 2, (64, 64), 48, 5)
    rest = None, None, None, None, 0.125, None
    check(run(states, *rest), states, *rest)
