"""The attention ops on the CPU: against softmax over a whole float64 matrix, and as `torch.library` wants them."""

import contextlib
import functools
import os
import sys

import exact
import pytest
import shadow_step
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pyramid_cache import ops
from pyramid_cache.ops import registration, scores


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (heads, kv_heads, head_dim, rows, keys): odd lengths, rows from 1 to all, groups of 1, 3, 4 and 8.
SHAPES = [
    (3, 3, 64, 1, 1),
    (4, 4, 80, 37, 37),
    (9, 3, 64, 130, 130),
    (8, 2, 96, 64, 301),
    (8, 1, 128, 65, 129),
    (4, 1, 256, 17, 90),
    (2, 2, 64, 1, 77),
]


def states(heads, kv_heads, head_dim, rows, keys, dtype, batch=2):
    generator = torch.Generator().manual_seed(0)
    query = 1.5 * torch.randn(batch, rows, heads, head_dim, generator=generator).to(dtype).transpose(1, 2)
    key, value = (
        torch.randn(batch, keys, kv_heads, head_dim, generator=generator).to(dtype).transpose(1, 2) for _ in range(2)
    )
    return query, key, value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_are_sums_of_the_whole_matrix(shape, dtype) -> None:
    """Plain; and with padding, weights and a softcap."""
    heads, kv_heads, head_dim, rows, keys = shape
    query, key, _ = states(*shape, dtype)
    scaling, allowed = head_dim**-0.5, exact.causal(rows, keys)
    probabilities, lse = exact.attention(query, key, scaling, allowed)
    expected = exact.scores_of(probabilities, kv_heads)
    logits = scaling * query @ key.repeat_interleave(heads // kv_heads, dim=1).transpose(2, 3)
    plain = torch.softmax(logits.masked_fill(~allowed, float("-inf")).float(), dim=-1)
    # float32 rounding, or what computing it plainly in that precision is off by.
    error = (exact.scores_of(plain, kv_heads).double() - expected).abs().max().item()
    limit = 2e-5 * max(expected.max().item(), 1.0) if dtype == torch.float32 else 1.5 * error + 1e-4

    key_start = torch.tensor([keys // 3, keys], dtype=torch.int32)  # the second row is all padding
    row_weights = torch.linspace(-1, 2, rows).repeat(2, 1)
    row_weights[:, ::3] = 0
    padded = exact.causal(rows, keys, torch.arange(keys) >= key_start[:, None])
    padded_probabilities, padded_lse = exact.attention(query, key, scaling, padded, softcap=5.0)
    weighted = exact.scores_of(padded_probabilities, kv_heads, row_weights)
    options = {"row_weights": row_weights, "key_start": key_start, "softcap": 5.0}
    found = ops.attention_scores(query, key, lse.float(), scaling=scaling)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert (found - expected).abs().max() <= limit
    found = ops.attention_scores(query, key, padded_lse.float(), scaling=scaling, **options)
    assert (found - weighted).abs().max() <= 2 * limit
    assert found[1].eq(0).all() and found[0, :, : keys // 3].eq(0).all()


def test_rows_that_do_not_count_add_nothing_whatever_they_hold() -> None:
    exact.check_rows_that_do_not_count(scores._attention_scores, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_attention_is_attention_of_the_whole_matrix(dtype) -> None:
    limit = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for heads, kv_heads, head_dim, value_dim in ((9, 3, 64, 64), (8, 1, 96, 80), (2, 2, 128, 256)):
        slots, scaling = 83, head_dim**-0.5
        query, key, _ = states(heads, kv_heads, head_dim, 1, slots, dtype)
        value = torch.randn(2, kv_heads, slots, value_dim).to(dtype)
        mask = torch.rand(2, kv_heads, slots) < 0.7
        mask[1, 0] = False  # a head that holds nothing
        shared_mask, bias = mask[:1, :1].repeat(2, 1, 1), 2 * torch.randn(2, kv_heads, slots)
        for mask, bias, softcap, sinks in (  # noqa: B020
            (None, None, None, None),
            (mask, None, None, None),
            (shared_mask, bias, 3.0, None),
            (None, None, None, torch.randn(heads)),
            (mask, bias[:, :1], 3.0, torch.randn(heads)),
        ):
            output, probabilities = ops.decode_attention(
                query, key, value, scaling=scaling, mask=mask, bias=bias, softcap=softcap, sink_logits=sinks
            )
            expected = exact.decode(query, key, value, mask, bias, sinks, scaling, softcap)
            assert output.dtype == dtype and (output - expected[0]).abs().max() <= limit
            assert (probabilities - expected[1]).abs().max() <= limit * heads // kv_heads + limit


def test_a_slot_biased_by_the_logarithm_of_a_number_counts_as_so_many() -> None:
    query, key, value = states(6, 2, 16, 1, 9, torch.float32)
    numbers = torch.tensor([1, 4, 2, 1, 1, 7, 1, 3, 1])
    slots = torch.arange(9).repeat_interleave(numbers)
    options = {"scaling": 0.25, "softcap": 3.0, "sink_logits": torch.randn(6)}
    repeated = (tensor[:, :, slots] for tensor in (key, value))
    wanted, probabilities = ops.decode_attention(query, *repeated, **options)
    for heads in (1, 2):
        bias = numbers.log().expand(2, heads, -1)
        output, sums = ops.decode_attention(query, key, value, bias=bias, **options)
        torch.testing.assert_close(output, wanted)
        torch.testing.assert_close(sums, torch.zeros_like(sums).index_add(2, slots, probabilities))


def test_without_a_kernel_cuda_computes_as_the_cpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a dtype that kernels do not take, and where there are none, in float32: no output is further off for it."""
    query, key, value = states(6, 2, 16, 5, 9, torch.float64)
    lse = exact.attention(query, key, 0.25, exact.causal(5, 9))[1].float()
    found = scores._scores_on_cuda(query, key, lse, None, None, 0.25, None)
    assert torch.equal(found, ops.attention_scores(query, key, lse, scaling=0.25))
    monkeypatch.setattr(registration, "kernels_of", lambda module, device: None)
    call = (query[:, :, -1:].bfloat16(), key.bfloat16(), value.bfloat16())
    found = scores._decode_on_cuda(*call, None, None, None, 0.25, None)
    for one, wanted in zip(found, exact.decode(*call, None, None, None, 0.25, None), strict=True):
        torch.testing.assert_close(one, wanted.to(one.dtype), rtol=2**-8 if one is found[0] else 1e-5, atol=1e-6)


def op_samples(device: str = "cpu"):
    """Arguments for every op, as `opcheck` takes them; fresh ones, because ops write into them."""
    some = functools.partial(torch.rand, device=device)
    query, key, value, lse = some(2, 6, 5, 16), some(2, 2, 9, 16), some(2, 2, 9, 8), some(2, 6, 5)
    weights, start = some(2, 5), torch.zeros(2, dtype=torch.int32, device=device)
    yield scores._attention_scores, (query, key, lse, weights, start, 0.25, 4.0)
    yield scores._attention_scores, (query, key, lse, None, None, 0.25, None)
    mask, bias, sinks = torch.ones(2, 1, 9, dtype=torch.bool, device=device), some(2, 2, 9), some(6)
    yield scores.decode_attention_unchecked, (some(2, 6, 1, 16), key, value, mask, bias, sinks, 0.25, None)
    yield scores.decode_attention_unchecked, (some(2, 6, 1, 16), key, value, None, None, None, 0.25, 2.0)
    known = torch.ops.pyramid_cache
    starts, latest = torch.tensor([0, 3, 3, 4, 5], device=device), (some(2, 2, 9, 16), some(2, 2, 9, 8))
    packed = (some(2, 6, 1, 16), some(5, 16), some(5, 8), starts, 3, *latest, 0.3, 2.0)
    for options in ((None, None), (mask, some(5))):
        yield known.decode_packed_attention.default, (*packed, *options)
    for shape, head_starts in (((2, 2, 9), None), ((2, 1, 15), torch.tensor([[0, 6, 15], [0, 9, 9]], device=device))):
        codes = (torch.ones(*shape, 8, dtype=torch.uint8, device=device), some(*shape, 2).half())
        slots = (torch.ones(2, 1, 18, dtype=torch.bool, device=device), some(2, 2, 18), sinks, head_starts)
        numbers = (9, 4, False, 3, 16, 16, 0.3, 2.0)
        states = (some(2, 6, 1, 16), *codes, *codes, *(some(2, 2, 9, 16) for _ in "kv"))
        yield known.decode_quantized_attention.default, (*states, *slots, *numbers)
    tensors, incoming = shadow_step.step_tensors(device), torch.tensor([[[5, -1, 0], [-1, -1, 3]]] * 2, device=device)
    buffer, chunk_mask = tensors["keys_buffer"].narrow(2, 4, 24), tensors["mask"]
    rotation = (tensors["inverse_frequencies"], False, 8)
    for num_chunks in (3, 130):
        yield known.select_chunks.default, (tensors["query"], tensors["landmarks"], chunk_mask, num_chunks, 0.25)
    books = (torch.tensor(held, device=device) for held in ([[[3, 1, -1]]], [[[1, 0, 2]]]))
    yield known.plan_chunks.default, (*books,)
    yield known.reconstruct_keys.default, (buffer, tensors["low_rank"], tensors["basis"], incoming, *rotation)
    yield known.gather_values.default, (buffer, tensors["values"], incoming, 8)


def test_ops_are_well_registered() -> None:
    """And fake results, on a device that is not there, have the shapes, dtypes and strides of real ones."""
    with FakeTensorMode():
        fakes = [op(*arguments) for op, arguments in op_samples("cuda")]
    for fake, (op, arguments) in zip(fakes, op_samples(), strict=True):
        torch.library.opcheck(op, arguments)
        real = op(*arguments)
        if real is None:  # it writes alone
            continue
        for one, other in [(fake, real)] if isinstance(real, torch.Tensor) else zip(fake, real, strict=True):
            assert one.device.type == "cuda"
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_scores_and_decoding_are_one_graph_at_any_length(backend: str) -> None:
    def step(query, key, value, lse):
        received = ops.attention_scores(query, key, lse, scaling=0.25, softcap=9.0)
        return received, *ops.decode_attention(query[:, :, -1:], key, value, scaling=0.25)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for keys in (9, 14):
        arguments = (*states(6, 2, 16, 5, keys, torch.float32), torch.rand(2, 6, 5))
        for found, expected in zip(compiled(*arguments), step(*arguments), strict=True):
            torch.testing.assert_close(found, expected)


def test_gradients_take_the_specification_and_ops_refuse_them() -> None:
    given = *states(4, 2, 16, 1, 7, torch.float32), torch.rand(2, 2, 7)
    query, key, value, bias = (tensor.clone().requires_grad_() for tensor in given)
    output, probabilities = ops.decode_attention(query, key, value, scaling=0.25, bias=bias)
    (output.sum() + probabilities.square().sum()).backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in (query, key, value, bias))
    assert ops.decode_attention(*given[:3], scaling=0.25, bias=bias)[0].requires_grad
    with pytest.raises(NotImplementedError, match="has no gradient.*torch.no_grad"):
        torch.ops.pyramid_cache.decode_attention(query, key, value, None, bias, None, 0.25, None)
    with torch.no_grad():
        assert torch.equal(
            torch.ops.pyramid_cache.decode_attention(query, key, value, None, bias, None, 0.25, None)[0], output
        )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="modules are imported anew in a fork, which needs no new torch")
def test_modules_can_be_imported_anew() -> None:
    """As notebooks do whose source has changed."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            for name in [name for name in sys.modules if name.startswith("pyramid_cache")]:
                del sys.modules[name]
            from pyramid_cache.ops import decode_attention

            states = torch.ones(1, 2, 1, 8), torch.ones(1, 2, 5, 8), torch.ones(1, 2, 5, 8)
            os._exit(round(decode_attention(*states, scaling=1.0)[1].sum().item(), 5) != 2.0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_autocast_does_not_round_what_the_ops_are_given() -> None:
    call = functools.partial(ops.decode_attention, *states(4, 2, 16, 1, 7, torch.float32), scaling=0.25)
    expected = call()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, call(), expected))


def test_shapes_and_dtypes_that_do_not_fit_are_refused() -> None:
    key, value, row = torch.zeros(2, 2, 9, 16), torch.zeros(2, 2, 9, 16), torch.zeros(2, 6, 1, 16)
    scores_of, decode = ops.attention_scores, ops.decode_attention
    given = {
        scores_of: {"query": torch.zeros(2, 6, 5, 16), "key": key, "lse": torch.zeros(2, 6, 5)},
        decode: {"query": row, "key": key, "value": value},
    }
    for op, change, message in (
        (scores_of, {"key": key[..., :8]}, r"`key` must have the shape \(2, any, any, 16\), but has \(2, 2, 9, 8\)"),
        (scores_of, {"key": torch.zeros(2, 4, 9, 16)}, "6 query heads cannot share 4 KV heads"),
        (scores_of, {"key": key[:, :, :4]}, "5 query rows cannot be the last ones of 4 keys"),
        (scores_of, {"lse": torch.zeros(2, 6, 4)}, r"`lse` must have the shape \(2, 6, 5\)"),
        (scores_of, {"row_weights": torch.zeros(3, 5)}, r"`row_weights` must have the shape \(2 or 1, 5\)"),
        (scores_of, {"key_start": torch.zeros(1)}, r"`key_start` must have the shape \(2\)"),
        (scores_of, {"key": key.half()}, r"`key` must be torch.float32, but is torch.float16. Convert it with"),
        (scores_of, {"lse": torch.zeros(2, 6, 5).bfloat16()}, "`lse` must be torch.float32"),
        (scores_of, {"row_weights": torch.zeros(2, 5).double()}, "`row_weights` must be torch.float32"),
        (scores_of, {"key_start": torch.zeros(2).long()}, "`key_start` must be torch.int32"),
        (decode, {"query": torch.zeros(2, 6, 2, 16)}, r"`query` must have the shape \(any, any, 1, any\)"),
        (decode, {"query": row.half()}, "`key` must be torch.float16, but is torch.float32"),
        (decode, {"mask": torch.ones(2, 2, 9)}, "`mask` must be torch.bool"),
        (decode, {"value": value[:, :, :8]}, r"`value` must have the shape \(2, 2, 9, any\)"),
        (decode, {"mask": torch.ones(2, 3, 9).bool()}, r"`mask` must have the shape \(2, 2 or 1, 9\)"),
        (decode, {"bias": torch.ones(2, 3, 9)}, r"`bias` must have the shape \(2, 2 or 1, 9\)"),
        (decode, {"bias": torch.ones(2, 1, 9).half()}, "`bias` must be torch.float32"),
        (decode, {"sink_logits": torch.zeros(2)}, r"`sink_logits` must have the shape \(6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            op(**(given[op] | change), scaling=1.0)
