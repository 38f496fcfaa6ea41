"""The ops of a ShadowKV cache: their specification against loops, and how they meet `torch.library` and compilers."""

import math
from itertools import product

import exact
import pytest
import torch
from shadow_step import inverse_frequencies, loaded_tokens, overlapping, random_incoming, step, step_tensors
from torch._subclasses.fake_tensor import FakeTensorMode

from pyramid_cache.ops import shadow


BF16, F32 = torch.bfloat16, torch.float32


def slow_key(unrotated, position: int, inverse_frequencies, interleaved: bool) -> list[float]:
    """One key `(head_dim,)`, turned pair by pair."""
    key, pairs = unrotated.tolist(), len(inverse_frequencies)
    for pair in range(pairs):
        angle = float(torch.tensor(position, dtype=torch.float32) * inverse_frequencies[pair])
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + pairs)
        a, b = key[first], key[second]
        key[first] = a * math.cos(angle) - b * math.sin(angle)
        key[second] = b * math.cos(angle) + a * math.sin(angle)
    return key


@pytest.mark.parametrize("batch, heads, kv_heads", [(1, 3, 3), (3, 6, 2), (3, 4, 1)])
def test_selected_chunks_draw_most_attention(batch: int, heads: int, kv_heads: int) -> None:
    for num_chunks in (3, 11, 16):
        query, landmarks = torch.randn(batch, heads, 1, 20), torch.randn(batch, kv_heads, 11, 20)
        allowed = torch.rand(batch, kv_heads, 11) < 0.6
        allowed[-1, -1], allowed[0, 0] = False, True
        selected = shadow.select_chunks(query, landmarks, num_chunks=num_chunks, scaling=0.4, mask=allowed)
        assert selected.shape == (batch, kv_heads, num_chunks) and selected.dtype == torch.int64
        for_heads = allowed.repeat_interleave(heads // kv_heads, dim=1)[:, :, None]
        probabilities, _ = exact.attention(query, landmarks, 0.4, for_heads)
        best = probabilities[:, :, 0].unflatten(1, (kv_heads, -1)).amax(dim=2)
        for row, head in product(range(batch), range(kv_heads)):
            chunks = allowed[row, head].nonzero().flatten().tolist()
            wanted = sorted(chunks, key=best[row, head].tolist().__getitem__, reverse=True)[:num_chunks]
            found = selected[row, head].tolist()
            assert set(found[: len(wanted)]) == set(wanted)
            assert found[len(wanted) :] == [-1] * (num_chunks - len(wanted))


@pytest.mark.parametrize("places, chunks", [(1, 2), (7, 9), (32, 200)])
def test_plan_keeps_hits_and_loads_misses_only(places: int, chunks: int) -> None:
    held = torch.full((2, 3, places), -1)
    buffer = [[-1] * places for _ in range(6)]
    for _ in range(50):
        wanted = torch.stack([torch.randperm(chunks)[:places] for _ in range(6)])
        wanted[torch.rand(wanted.shape) < 0.1] = -1
        incoming = shadow.plan_chunks(held, wanted.view(2, 3, places)).view(6, places)
        for head in range(6):
            before, asked = list(buffer[head]), {chunk for chunk in wanted[head].tolist() if chunk >= 0}
            loads = {place: chunk for place, chunk in enumerate(incoming[head].tolist()) if chunk >= 0}
            assert len(loads) == len(asked - set(before)) and not asked.intersection(before[place] for place in loads)
            for place, chunk in enumerate(held.view(6, places)[head].tolist()):
                # What is held is what was loaded last; a place that is left over is marked, whatever lies there.
                assert chunk in (-1, loads.get(place, before[place])) and (chunk >= 0 or before[place] not in asked)
                buffer[head][place] = chunk
            assert sorted(chunk for chunk in buffer[head] if chunk >= 0) == sorted(asked)


def test_plan_of_an_example() -> None:
    held = torch.tensor([[[4, -1, 7, 2, 9]]])
    incoming = shadow.plan_chunks(held, torch.tensor([[[2, 5, -1, 4, 8]]]))
    assert incoming.tolist() == [[[-1, 5, 8, -1, -1]]]
    assert held.tolist() == [[[4, 5, 8, 2, -1]]]


@pytest.mark.parametrize(
    "case",
    [
        (1, 3, 5, 64, 64, False, 8),
        (3, 1, 40, 80, 32, False, 5),
        (3, 2, 160, 128, 128, True, 8),
        (1, 2, 40, 80, 20, True, 5),
        (1, 2, 5, 64, 0, False, 8),
    ],
)
def test_what_a_plan_loads_is_what_the_loop_loads(case: tuple) -> None:
    """Keys that are multiplied and turned one by one, and values that are copied."""
    batch, kv_heads, rank, head_dim, rotary_dim, interleaved, chunk_size = case
    chunks, places = 100_000 // chunk_size, 3
    tokens = (chunks - 1) * chunk_size + 2
    low_rank, basis = overlapping(batch, tokens, rank) / rank**0.5, torch.randn(batch, kv_heads, rank, head_dim)
    incoming, frequencies = random_incoming(batch, kv_heads, places, chunks), inverse_frequencies(rotary_dim)
    values = overlapping(batch, kv_heads, tokens, head_dim)
    # Slices of larger buffers, whose heads and slots are the other way round in memory.
    keys, found = torch.randn(2, batch, places * chunk_size + 7, kv_heads, head_dim).transpose(2, 3)
    wanted_keys, wanted = keys.double(), found.clone()
    for row, head, slot, token in loaded_tokens(incoming, chunk_size, tokens):
        key = low_rank[row, token].double() @ basis[row, head].double()
        turned = slow_key(key, token, frequencies, interleaved)
        wanted_keys[row, head, 3 + slot] = torch.tensor(turned, dtype=torch.float64)
        wanted[row, head, 3 + slot] = values[row, head, token]
    part, inputs = slice(3, 3 + places * chunk_size), (low_rank, basis, incoming, frequencies)
    shadow.reconstruct_keys(keys[:, :, part], *inputs, chunk_size=chunk_size, interleaved=interleaved)
    torch.testing.assert_close(keys.double(), wanted_keys, rtol=0, atol=1e-5)
    shadow.gather_values(found[:, :, part], values, incoming, chunk_size=chunk_size)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "dtype, stored",
    [(BF16, BF16), (torch.float16, torch.float16), *((F32, quantized) for quantized in shadow.QUANTIZED_DTYPES)],
)
def test_numbers_are_those_of_float32_rounded_once(dtype: torch.dtype, stored: torch.dtype) -> None:
    """Factors in half precision or in one byte, and landmarks in one byte."""
    is_quantized = stored in shadow.QUANTIZED_DTYPES
    low_rank, landmarks = (100 * torch.randn(shape) for shape in ((2, 24, 160), (2, 3, 9, 64)))
    low_rank = low_rank.clamp(-127, 127).to(stored if is_quantized else dtype)
    basis = (torch.randn(2, 3, 160, 64) / 100).to(F32 if is_quantized else stored)
    incoming, frequencies = random_incoming(2, 3, 3, 3), inverse_frequencies(64)
    buffers = [torch.zeros(2, 3, 24, 64, dtype=kind) for kind in (dtype, F32)]
    for buffer, factors in zip(buffers, [(low_rank, basis), (low_rank.float(), basis.float())], strict=True):
        shadow.reconstruct_keys(buffer, *factors, incoming, frequencies, chunk_size=8)
    assert torch.equal(buffers[0], buffers[1].to(dtype))
    if is_quantized:
        query, landmarks = torch.randn(2, 6, 1, 64) / 100, landmarks.clamp(-127, 127).to(stored)
        options = {"num_chunks": 4, "scaling": 1.0, "mask": torch.ones(2, 3, 9, dtype=torch.bool)}
        chosen = [shadow.select_chunks(query, each, **options) for each in (landmarks, landmarks.float())]
        assert torch.equal(*chosen)


def test_a_step_is_one_graph() -> None:
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    ours = step_tensors()
    theirs = {name: tensor.clone() for name, tensor in ours.items()}
    for _ in range(3):
        ours["query"] = theirs["query"] = torch.randn(2, 8, 1, 64)
        assert torch.equal(compiled(theirs), step(ours))
        for name in ("held", "keys_buffer", "values_buffer"):
            assert torch.equal(theirs[name], ours[name]), name
    assert (ours["keys_buffer"][:, :, 4:16] != 0).any()


def test_a_step_on_a_fake_gpu_takes_values_from_the_host() -> None:
    with FakeTensorMode():
        tensors = step_tensors("cuda")
        assert tensors["values"].device.type == "cpu"
        incoming = step(tensors)
    assert incoming.shape == (2, 2, 24) and incoming.dtype == torch.int64 and incoming.device.type == "cuda"


def test_values_in_pageable_memory_are_refused_for_a_gpu() -> None:
    # Which kernel runs is the dispatcher's choice: CUDA's is asked here with what it would see.
    with pytest.raises(ValueError, match=r"pageable.*\.pin_memory\(\)"):
        shadow._gather_values_cuda(torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 9, 4), torch.zeros(1, 1, 2).long(), 4)


def test_wrong_arguments_and_gradients_are_refused() -> None:
    held, buffer = torch.zeros(1, 1, 2).long(), torch.zeros(1, 1, 8, 4)
    low_rank, basis = torch.zeros(1, 9, 3), torch.zeros(1, 1, 3, 4)
    query, landmarks = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 5, 4)
    gather, plan, choose = shadow.gather_values, shadow.plan_chunks, shadow.select_chunks
    for message, op, arguments, named in (
        ("8 slots, which are not 2 places of 3", gather, (buffer, buffer, held), {"chunk_size": 3}),
        ("`values` must be torch.float32", gather, (buffer, buffer.half(), held), {"chunk_size": 4}),
        ("`incoming` must be torch.int64", gather, (buffer, buffer, held.int()), {"chunk_size": 4}),
        ("`incoming` is on meta, but must be on", gather, (buffer, buffer, held.to("meta")), {"chunk_size": 4}),
        ("`wanted` must have the shape", plan, (held, held[..., :1]), {}),
        ("`held` must be torch.int64", plan, (held.int(), held), {}),
        ("3 query heads", choose, (torch.zeros(1, 3, 1, 4), landmarks), {"num_chunks": 1}),
        ("`num_chunks` must be at least 1, but is 0", choose, (query, landmarks), {"num_chunks": 0}),
        ("`mask` must have the shape", choose, (query, landmarks), {"mask": torch.ones(1, 3, 5).bool()}),
        ("3 inverse frequencies turn", None, (low_rank, basis, held, torch.ones(3)), {}),
        ("`inverse_frequencies` must be torch.float32", None, (low_rank, basis, held, torch.ones(2).half()), {}),
        (
            "`low_rank` must be torch.float32 or .* but is torch.float16",
            None,
            (low_rank.half(), basis, held, torch.ones(2)),
            {},
        ),
        ("`basis` must have the shape", None, (low_rank, basis[:, :, :2], held, torch.ones(2)), {}),
    ):
        if op is choose:
            named = {"num_chunks": 1, "scaling": 1.0, "mask": torch.ones(1, 2, 5).bool()} | named
        if op is None:
            op, arguments, named = shadow.reconstruct_keys, (buffer, *arguments), {"chunk_size": 4}
        with pytest.raises(ValueError, match=message):
            op(*arguments, **named)
    with pytest.raises(NotImplementedError, match="select_chunks"):
        choose(query.requires_grad_(), landmarks, num_chunks=1, scaling=1.0, mask=torch.ones(1, 2, 5).bool())
