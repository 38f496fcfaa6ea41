"""
The Triton kernels of `pyramid_cache.ops.triton_scores` against float64 and against their specification.

They run on a GPU, or, with `TRITON_INTERPRET=1` in the environment, on the CPU in Triton's interpreter, which is what
`test_interpreter.py` does. Shapes are small, because the interpreter is slow, and cross the borders of blocks all the same.
"""

import os

import pytest
import torch


pytestmark = [
    pytest.mark.cuda,
    # NumPy minds what GPUs do not: infinities and NaN, which the kernels choose away after they have come up.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
if not IS_INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from pyramid_cache.ops import reference, triton_scores  # noqa: E402


needs_gpu = pytest.mark.skipif(IS_INTERPRETED, reason="needs a GPU: there is nothing to record or to fill here")
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def no_bfloat16_in_the_interpreter(request: pytest.FixtureRequest) -> None:
    """The interpreter multiplies the bits of bfloat16 as if they were integers."""
    callspec = getattr(request.node, "callspec", None)
    if IS_INTERPRETED and callspec is not None and torch.bfloat16 in callspec.params.values():
        pytest.skip("needs a GPU: the interpreter's bfloat16 products are wrong")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers that are the same on every device."""
    return torch.randn(*shape).to(DEVICE, dtype)


def heads_last(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, laid out as `(batch, seq, heads, head_dim)`, with a gap between the rows."""
    batch, heads, length, width = tensor.shape
    storage = torch.full((batch, length, heads, width + 8), float("nan"), dtype=tensor.dtype, device=tensor.device)
    view = storage[..., :width].transpose(1, 2)
    view.copy_(tensor)
    return view


def dims_first(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, laid out so that the numbers of one head of one token are far apart."""
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


def exact_logits(query: torch.Tensor, key: torch.Tensor, scaling: float, softcap: float | None) -> torch.Tensor:
    """float64 logits `(batch, heads, rows, keys)`."""
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query.double() @ key.transpose(2, 3) * scaling
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def exact_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    row_weights: torch.Tensor | None,
    key_start: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    group_sum: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and log-sum-exps of a softmax over the whole matrix in float64."""
    rows, keys = query.shape[2], key.shape[2]
    is_allowed = torch.ones(rows, keys, dtype=torch.bool, device=DEVICE).tril(keys - rows)[None, None]
    if key_start is not None:
        is_allowed = is_allowed & (torch.arange(keys, device=DEVICE) >= key_start[:, None])[:, None, None]
    logits = exact_logits(query, key, scaling, softcap).masked_fill(~is_allowed, float("-inf"))
    lse = logits.logsumexp(dim=-1)
    probabilities = torch.softmax(logits, dim=-1).nan_to_num(0.0)  # a row of padding attends to nothing
    if row_weights is not None:
        probabilities = probabilities * row_weights.double()[:, None, :, None]
    scores = probabilities.sum(dim=2)
    return (scores.unflatten(1, (key.shape[1], -1)).sum(dim=2) if group_sum else scores), lse


def check_error(found: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor, dtype: torch.dtype) -> None:
    """
    Raises unless what a kernel found is as near to the truth as its dtype allows: float32 up to the order of its sums, and
    less exact types up to twice the error of plain PyTorch.
    """
    size = exact.abs().max().item()
    limit = 3e-6 * max(size, 1.0)
    if dtype != torch.float32:
        limit += 2 * (eager.double() - exact).abs().max().item()
    assert found.shape == exact.shape
    assert (found.double() - exact).abs().max().item() <= limit


@pytest.mark.parametrize(
    "dtype, heads, kv_heads, rows, keys, head_dim, options",
    [
        (F32, 2, 2, 37, 37, 64, ""),
        (F32, 6, 2, 33, 101, 96, "start weights heads_last"),
        (F32, 4, 1, 3, 5, 256, "softcap"),
        (F32, 8, 1, 40, 75, 128, "weights per_head"),
        (F32, 2, 1, 17, 40, 40, "start dims_first softcap"),
        (F16, 3, 1, 1, 130, 80, "start"),
        (F16, 8, 2, 65, 200, 128, "weights start per_head heads_last"),
        (F16, 8, 1, 150, 150, 64, "softcap weights"),
        (F16, 3, 3, 70, 71, 256, "start"),
        (BF16, 8, 2, 150, 300, 128, "start weights heads_last"),
        (BF16, 3, 1, 99, 99, 80, "softcap per_head"),
        (BF16, 8, 1, 64, 64, 64, "weights"),
        (BF16, 4, 4, 300, 513, 256, "start"),
        pytest.param(BF16, 32, 8, 3000, 3001, 128, "start", marks=needs_gpu),
        pytest.param(F32, 9, 3, 1500, 1500, 64, "weights", marks=needs_gpu),
    ],
)
def test_scores(
    dtype: torch.dtype, heads: int, kv_heads: int, rows: int, keys: int, head_dim: int, options: str
) -> None:
    query, key = random(2, heads, rows, head_dim, dtype=dtype), random(2, kv_heads, keys, head_dim, dtype=dtype)
    for name, change in (("heads_last", heads_last), ("dims_first", dims_first)):
        if name in options:
            query, key = change(query), change(key)
    # The second row of the batch has padding within the window of queries.
    key_start = torch.tensor([keys // 4, keys - rows // 2 - 1], device=DEVICE, dtype=torch.int32)
    key_start = key_start if "start" in options else None
    row_weights = random(1 if "heads_last" in options else 2, rows) if "weights" in options else None
    softcap, group_sum, scaling = (5.0 if "softcap" in options else None), "per_head" not in options, head_dim**-0.5
    exact, lse = exact_scores(query, key, row_weights, key_start, scaling, softcap, group_sum)
    arguments = (query, key, lse.float(), row_weights, key_start, scaling, softcap, group_sum)
    check_error(triton_scores.attention_scores(*arguments), exact, reference.attention_scores(*arguments), dtype)


@pytest.mark.parametrize("blocks", [(64, 16, 4, 2), (128, 64, 4, 3), (16, 128, 4, 1)])
def test_scores_do_not_depend_on_the_blocks(blocks: tuple[int, ...]) -> None:
    query, key = random(1, 4, 90, 64, dtype=F16), random(1, 2, 150, 64, dtype=F16)
    exact, lse = exact_scores(query, key, None, None, 0.125, None, True)
    found = triton_scores.attention_scores(
        query, key, lse.float(), None, None, 0.125, None, True, blocks=triton_scores.ScoreBlocks(*blocks)
    )
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_rows_that_do_not_count_add_nothing_whatever_they_hold() -> None:
    query, key = random(2, 4, 50, 64), random(2, 2, 80, 64)
    _, lse = exact_scores(query, key, None, None, 0.125, None, True)
    lse = lse.float()
    row_weights = torch.rand(2, 50).to(DEVICE)
    row_weights[:, 5:9] = 0.0
    lse[:, 1, 30] = float("inf")
    lse[:, 2, 31] = float("-inf")
    arguments = (row_weights, None, 0.125, None, True)
    expected = triton_scores.attention_scores(query, key, lse, *arguments)
    query[:, :, 5] = float("nan")
    query[:, :, 6] = float("inf")
    lse[:, :, 7] = float("nan")
    lse[:, :, 8] = -1e30
    query[:, 1, 30] = float("nan")
    query[:, 2, 31] = float("-inf")
    found = triton_scores.attention_scores(query, key, lse, *arguments)
    assert found.isfinite().all()
    assert torch.equal(found, expected)

    # What counts and is NaN stays in its row of the batch, and in its group.
    query[1, 0, 20] = float("nan")
    spoiled = triton_scores.attention_scores(query, key, lse, *arguments)
    assert torch.equal(spoiled[0], expected[0])
    assert torch.equal(spoiled[1, 1], expected[1, 1])
    assert spoiled[1, 0, :51].isnan().all()
    assert torch.equal(spoiled[1, 0, 51:], expected[1, 0, 51:])  # row 20 of 50 sees the first 51 of 80 keys


def exact_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sink_logits: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of one query in float64: output, log-sum-exps, group sums of probabilities."""
    batch, heads, _, _ = query.shape
    kv_heads = key.shape[1]
    logits = exact_logits(query, key, scaling, softcap)[:, :, 0]
    if mask is not None:
        mask = mask.expand(-1, kv_heads, -1).repeat_interleave(heads // kv_heads, dim=1)
        logits = logits.masked_fill(~mask, float("-inf"))
    sinks = torch.full((heads,), float("-inf"), device=DEVICE) if sink_logits is None else sink_logits
    lse = torch.cat([logits, sinks.double().view(1, -1, 1).expand(batch, -1, 1)], dim=-1).logsumexp(dim=-1)
    probabilities = (logits - lse[..., None]).exp().nan_to_num(0.0)
    output = probabilities[:, :, None] @ value.double().repeat_interleave(heads // kv_heads, dim=1)
    return output.transpose(1, 2), lse, probabilities.unflatten(1, (kv_heads, -1)).sum(dim=2)


@pytest.mark.parametrize(
    "dtype, heads, kv_heads, slots, head_dim, value_dim, options",
    [
        (F32, 2, 2, 1, 64, 64, ""),
        (F32, 6, 2, 333, 96, 64, "mask sinks"),
        (F32, 4, 1, 100, 256, 80, "softcap shared_mask heads_last"),
        (F32, 20, 1, 130, 128, 128, "mask sinks"),
        (F32, 4, 2, 90, 64, 64, "high_sinks"),
        (F32, 40, 1, 50, 64, 40, "softcap shared_mask dims_first"),
        (F16, 8, 1, 500, 64, 64, "mask"),
        (F16, 3, 1, 257, 80, 256, "sinks softcap heads_last"),
        (F16, 8, 2, 1100, 128, 128, "shared_mask"),
        (BF16, 8, 2, 1025, 128, 128, "mask sinks softcap"),
        (BF16, 3, 3, 77, 256, 256, ""),
        (BF16, 48, 1, 300, 96, 64, "shared_mask heads_last"),
        pytest.param(BF16, 32, 8, 70_001, 128, 128, "mask", marks=needs_gpu),
        pytest.param(F32, 9, 3, 20_000, 64, 64, "sinks", marks=needs_gpu),
    ],
)
def test_decode(
    dtype: torch.dtype, heads: int, kv_heads: int, slots: int, head_dim: int, value_dim: int, options: str
) -> None:
    batch = 2
    query = 2 * random(batch, heads, 1, head_dim, dtype=dtype)
    key, value = (random(batch, kv_heads, slots, width, dtype=dtype) for width in (head_dim, value_dim))
    for name, change in (("heads_last", heads_last), ("dims_first", dims_first)):
        if name in options:
            query, key, value = change(query), change(key), change(value)
    mask = None
    if "mask" in options:
        mask = (torch.rand(batch, 1 if "shared_mask" in options else kv_heads, slots) > 0.3).to(DEVICE)
        if "heads_last" in options:
            mask = mask.transpose(1, 2).contiguous().transpose(1, 2)
    sinks = random(heads) if "sinks" in options else None
    if "high_sinks" in options:
        sinks += 500  # whose exponentials are no float32
    arguments = (query, key, value, mask, sinks, head_dim**-0.5, 5.0 if "softcap" in options else None)
    found, eager = triton_scores.decode_attention(*arguments), reference.decode_attention(*arguments)
    for one, exact, plain in zip(found, exact_decode(*arguments), eager, strict=True):
        assert one.dtype == plain.dtype
        check_error(one, exact, plain, dtype)


@pytest.mark.parametrize("head_blocks", [None, (16, 4, 2), (128, 4, 2)])
def test_empty_slots_and_empty_heads(head_blocks: tuple[int, ...] | None) -> None:
    query, key, value = random(2, 6, 1, 64), random(2, 2, 200, 64), random(2, 2, 200, 64)
    mask = (torch.rand(2, 2, 200) > 0.5).to(DEVICE)
    mask[0, :, 20:150] = False  # whole splits are empty
    mask[1, 1] = False
    blocks = None if head_blocks is None else triton_scores.DecodeBlocks(*head_blocks)
    expected = exact_decode(query, key, value, mask, None, 0.125, None)
    for empty in (float("nan"), float("inf")):
        key, value = (tensor.masked_fill(~mask[..., None], empty) for tensor in (key, value))
        found = triton_scores.decode_attention(query, key, value, mask, None, 0.125, None, blocks=blocks)
        for one, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(one.double(), exact, rtol=1e-5, atol=1e-5)
        output, lse, probabilities = found
        assert (output[1, :, 3:] == 0).all()
        assert (lse[1, 3:] == float("-inf")).all()
        assert (probabilities[1, 1] == 0).all()


def test_a_head_that_is_not_a_number_leaves_the_others_alone() -> None:
    query, key, value = random(2, 6, 1, 64), random(2, 2, 100, 64), random(2, 2, 100, 64)
    expected = triton_scores.decode_attention(query, key, value, None, None, 0.125, None)
    query[1, 4] = float("nan")
    output, lse, probabilities = triton_scores.decode_attention(query, key, value, None, None, 0.125, None)
    others = [0, 1, 2, 3, 5]
    assert output[1, 0, 4].isnan().all()
    assert lse[1, 4].isnan()
    assert probabilities[1, 1].isnan().all()
    assert torch.equal(output[:, :, others], expected[0][:, :, others])
    assert torch.equal(lse[:, others], expected[1][:, others])
    assert torch.equal(probabilities[:, 0], expected[2][:, 0])
    assert torch.equal(probabilities[0], expected[2][0])


@pytest.fixture
def far_apart() -> torch.Tensor:
    """`(1, 1, 20, 64)`: the last rows begin more than 2**31 elements behind the first. Only what is used is touched."""
    stride = 2**27 + 64
    try:
        storage = torch.empty(19 * stride + 64, dtype=torch.float16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"needs a GPU: there is no room for 5 GiB of addresses ({error})")
    rows = storage.as_strided((1, 1, 20, 64), (0, 0, stride, 1))
    rows.copy_(torch.randn(1, 1, 20, 64))
    return rows


def test_strides_beyond_31_bits(far_apart: torch.Tensor) -> None:
    near = far_apart.contiguous()
    lse = random(1, 1, 20)
    for layout in ((far_apart, near), (near, far_apart)):
        found = triton_scores.attention_scores(*layout, lse, None, None, 0.125, None, True)
        assert torch.equal(found, triton_scores.attention_scores(near, near, lse, None, None, 0.125, None, True))
    query = random(1, 2, 1, 64, dtype=F16)
    expected = triton_scores.decode_attention(query, near, near, None, None, 0.125, None)
    found = triton_scores.decode_attention(query, far_apart, far_apart, None, None, 0.125, None)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

    new = random(1, 1, 1, 64, dtype=F16)
    slots = torch.full((1, 1, 1), 18, device=DEVICE)
    number = torch.full((1, 1, 1), 30, dtype=torch.int32, device=DEVICE)
    positions, scores = torch.arange(20, dtype=torch.int32, device=DEVICE).view(1, 1, 20), random(1, 1, 20)
    triton_scores.decode_attention_and_evict(
        query, new, new, slots, number, number, None, None, far_apart, near, positions, scores, 0.125, None, True
    )
    assert torch.equal(far_apart[:, :, 18:19], new)
    assert torch.equal(near[:, :, 18:19], new)
    untouched = [*range(18), 19]
    assert torch.equal(far_apart[:, :, untouched], near[:, :, untouched])


class Cache:
    """
    A cache of heavy hitters whose tensors are views cut out of larger ones.

    Args:
        kv_heads, slots, head_dim, value_dim (`int`): Its size, for a batch of 2.
        dtype (`torch.dtype`): Of keys and values.
        num_empty (`int`): Slots of each head that are empty.
    """

    def __init__(
        self, kv_heads: int, slots: int, head_dim: int, value_dim: int, dtype: torch.dtype, num_empty: int
    ) -> None:
        torch.manual_seed(slots)
        order = torch.stack([torch.randperm(slots) for _ in range(2 * kv_heads)]).view(2, kv_heads, slots)
        self.storages = [
            random(2, slots + 3, kv_heads + 1, head_dim, dtype=dtype),
            random(2, kv_heads, slots + 3, value_dim + 5, dtype=dtype),
            torch.full((2, kv_heads + 1, slots, 2), -7, dtype=torch.int32, device=DEVICE),
            random(slots + 3, 2, kv_heads),
        ]
        self.key = self.storages[0][:, 2:-1, 1:].transpose(1, 2)
        self.value = self.storages[1][:, :, 1:-2, 3:-2]
        self.positions = self.storages[2][:, 1:, :, 1]
        self.scores = self.storages[3][3:].permute(1, 2, 0)
        self.positions.copy_((order - num_empty).clamp_min(-1))
        self.next_position = slots - num_empty
        self.slots = self.empty_slots()

    def empty_slots(self) -> torch.Tensor:
        """The first empty slot of each head."""
        return (self.positions < 0).int().argmax(dim=-1, keepdim=True)

    def fill_empty_slots(self, content: float) -> None:
        """Leaves something in the keys and values of empty slots."""
        is_empty = (self.positions < 0)[..., None]
        self.key.masked_fill_(is_empty, content)
        self.value.masked_fill_(is_empty, content)

    def surroundings(self) -> list[torch.Tensor]:
        """What lies beside the views. The cache is empty afterwards."""
        for view in (self.key, self.value, self.positions, self.scores):
            view.zero_()
        return self.storages

    def step(self, function, query, new_key, new_value, num_recent, evicts, sinks, softcap, has_empty) -> tuple:
        """Lets one function decode a token and evict, and chooses where the next token goes."""
        self.next_position += 1
        next_position = torch.full((2, 1, 1), self.next_position, dtype=torch.int32, device=DEVICE)
        results = function(
            query, new_key, new_value, self.slots, next_position, num_recent, evicts, sinks,
            self.key, self.value, self.positions, self.scores, 0.2, softcap, has_empty,
        )  # fmt: skip
        self.slots = self.empty_slots()
        return results


def search_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short caches find the victim as long ones do: not one program for all slots of a head, but one for each tile."""
    monkeypatch.setattr(triton_scores, "MAX_SLOTS_OF_ONE_PROGRAM", 0)
    monkeypatch.setattr(triton_scores, "num_multiprocessors", lambda device: 16)


@pytest.mark.parametrize(
    "dtype, group, kv_heads, slots, head_dim, value_dim, num_empty, options",
    [
        (F32, 1, 2, 45, 64, 64, 1, "tiles"),
        (F32, 4, 1, 70, 32, 80, 9, "sinks evicts"),
        (F16, 3, 1, 83, 64, 32, 5, "softcap tiles"),
        (F16, 20, 1, 33, 64, 64, 1, "sinks"),
        (BF16, 4, 2, 2100, 128, 128, 50, "evicts"),
        (BF16, 4, 2, 2100, 128, 128, 50, "evicts tiles"),
        (BF16, 8, 1, 700, 256, 64, 1, "softcap sinks"),
    ],
)
def test_forty_steps_of_eviction(
    dtype: torch.dtype,
    group: int,
    kv_heads: int,
    slots: int,
    head_dim: int,
    value_dim: int,
    num_empty: int,
    options: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "tiles" in options:
        search_tile_by_tile(monkeypatch)
    found, expected = (Cache(kv_heads, slots, head_dim, value_dim, one, num_empty) for one in (dtype, F32))
    expected.key.copy_(found.key)
    expected.value.copy_(found.value)
    found.fill_empty_slots(float("nan"))
    expected.fill_empty_slots(0.0)  # the specification multiplies what empty slots hold by zero
    sinks = random(kv_heads * group) if "sinks" in options else None
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == F32 else {"rtol": 1e-2, "atol": 1e-2}
    for step in range(40 if group <= 16 else 8):  # the interpreter takes as long for one head as for all of a group
        # At times all of a row is recent, and at times it is told not to evict: it fills a slot more each time.
        num_recent = torch.tensor([3, 9999 if num_empty >= 5 and step % 10 == 3 else 0], dtype=torch.int32)
        tensors = (
            random(2, kv_heads * group, 1, head_dim, dtype=dtype),
            heads_last(random(2, kv_heads, 1, head_dim, dtype=dtype)),
            random(2, kv_heads, 1, value_dim, dtype=dtype),
        )
        rest = (
            num_recent.view(2, 1, 1).to(DEVICE),
            torch.tensor([True, step % 10 != 7], device=DEVICE) if "evicts" in options else None,
            sinks,
            4.0 if "softcap" in options else None,
            num_empty > 1 or step % 2 == 0,
        )
        output, lse, victims = found.step(triton_scores.decode_attention_and_evict, *tensors, *rest)
        wanted = expected.step(reference.decode_attention_and_evict, *(tensor.float() for tensor in tensors), *rest)
        is_evicted = expected.positions.gather(2, wanted[2]) < 0
        assert torch.equal(victims[is_evicted], wanted[2][is_evicted])
        assert torch.equal(found.positions, expected.positions)
        torch.testing.assert_close(output.float(), wanted[0], **tolerance)
        torch.testing.assert_close(lse, wanted[1], rtol=1e-5, atol=1e-5)
        is_held = found.positions >= 0
        torch.testing.assert_close(found.scores[is_held], expected.scores[is_held], rtol=1e-5, atol=2e-5)
        assert torch.equal(found.key[is_held].float(), expected.key[is_held])
        assert torch.equal(found.value[is_held].float(), expected.value[is_held])
    fresh = Cache(kv_heads, slots, head_dim, value_dim, dtype, num_empty)
    for one, other in zip(found.surroundings(), fresh.surroundings(), strict=True):
        assert torch.equal(one, other)


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    "scores, positions, victim",
    [
        pytest.param([3, 2, 2, 5, 9], [4, 9, 7, 1, 2], 2, id="of equals the oldest"),
        pytest.param([7, 7, 7, 7, 7], [4, 9, 7, 1, 2], 3, id="all equal"),
        pytest.param([0.0, -0.0, 1, 1, 1], [8, 9, 1, 2, 3], 0, id="zeros of both signs are equal"),
        pytest.param([1, -1e-30, -2, -1.5, 0], [5, 4, 3, 2, 1], 2, id="negative"),
        pytest.param([INFINITY, 4, -INFINITY, 2, 1], [1, 2, 3, 4, 5], 2, id="minus infinity"),
        pytest.param([INFINITY] * 5, [5, 4, 3, 2, 1], 4, id="plus infinity"),
        pytest.param([3, 2, NAN, 5, 1], [4, 9, 7, 1, 2], 3, id="one is not a number: the oldest of all"),
        pytest.param([3, -NAN, NAN, 5, 1], [4, 9, 7, 1, 2], 3, id="two are not a number"),
        pytest.param([3, 2, NAN, 5, 1], [4, 9, 98, 1, 2], 4, id="a recent one is not a number"),
        pytest.param([3, 2, NAN, 5, 1], [4, 9, -1, 1, 2], 4, id="an empty one is not a number"),
        pytest.param([-3, 2, -9, 5, 1], [-1, 9, 99, 1, 2], 4, id="neither empty nor recent"),
        pytest.param([3, 2, 1, 5, 1], [97, -1, 98, 99, -1], None, id="all recent"),
    ],
)
@pytest.mark.parametrize("way", ["one program", "tiles"])
def test_victims_by_hand(
    scores: list[float], positions: list[int], victim: int | None, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "tiles":
        search_tile_by_tile(monkeypatch)
    # The new token, at position 100 in slot 5, draws all attention: what the others have stays as it is.
    query = torch.ones(1, 2, 1, 64, device=DEVICE)
    key = torch.full((1, 1, 6, 64), -100.0, device=DEVICE)
    value = random(1, 1, 6, 64)
    new_value = random(1, 1, 1, 64)
    position = torch.tensor([[[*positions, 50]]], dtype=torch.int32, device=DEVICE)
    score = torch.tensor([[[*scores, NAN]]], dtype=torch.float32, device=DEVICE)
    next_position, num_recent = (
        torch.full((1, 1, 1), number, dtype=torch.int32, device=DEVICE) for number in (101, 4)
    )
    output, lse, victims = triton_scores.decode_attention_and_evict(
        query, -key[:, :, :1], new_value, torch.full((1, 1, 1), 5, device=DEVICE), next_position, num_recent, None, None,
        key, value, position, score, 1.0, None, True,
    )  # fmt: skip
    expected = [*positions, 100]
    if victim is not None:
        assert victims.item() == victim
        expected[victim] = -1
    assert position.flatten().tolist() == expected
    assert torch.equal(output, new_value.expand(1, 1, 2, 64))
    assert torch.equal(lse, torch.full((1, 2), 6400.0, device=DEVICE))
    torch.testing.assert_close(score.flatten().cpu(), torch.tensor([*scores, 2.0]), rtol=0, atol=0, equal_nan=True)


@needs_gpu
def test_nothing_waits_for_the_device() -> None:
    """A CUDA graph records a step of decoding, and replays it as the specification runs it."""
    found, expected = (Cache(2, 600, 64, 64, F32, 30) for _ in range(2))
    query, new_key, new_value = random(2, 8, 1, 64), random(2, 2, 1, 64), random(2, 2, 1, 64)
    slots = found.slots.clone()
    next_position, num_recent = (
        torch.full((2, 1, 1), number, dtype=torch.int32, device=DEVICE) for number in (found.next_position + 1, 5)
    )

    def step(function, cache: Cache, slots: torch.Tensor) -> torch.Tensor:
        output, _, victims = function(
            query, new_key, new_value, slots, next_position, num_recent, None, None,
            cache.key, cache.value, cache.positions, cache.scores, 0.2, None, True,
        )  # fmt: skip
        slots.copy_(victims)
        next_position.add_(1)
        return output

    start = [tensor.clone() for tensor in (*found.storages, slots, next_position)]
    step(triton_scores.decode_attention_and_evict, found, slots)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step(triton_scores.decode_attention_and_evict, found, slots)
    for tensor, before in zip((*found.storages, slots, next_position), start, strict=True):
        tensor.copy_(before)
    outputs = []
    for _ in range(5):
        graph.replay()
        outputs.append(output.clone())
    next_position.copy_(start[-1])
    slots = start[-2]
    for one in outputs:
        torch.testing.assert_close(
            one, step(reference.decode_attention_and_evict, expected, slots), rtol=1e-4, atol=1e-5
        )
    assert torch.equal(found.positions, expected.positions)
