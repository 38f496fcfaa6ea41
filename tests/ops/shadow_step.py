"""What tests of the ops of ShadowKV share: plans of chunks, frequencies, and a decode step up to its attention."""

from collections.abc import Iterator

import torch

from pyramid_cache.ops import shadow


def random_incoming(batch: int, kv_heads: int, places: int, chunks: int) -> torch.Tensor:
    """
    A plan `(batch, kv_heads, places)` that loads the last chunk, and leaves alone a number of places that differs by
    head; where there are several heads, all places of the first.
    """
    incoming = torch.stack([torch.randperm(chunks)[:places] for _ in range(batch * kv_heads)])
    incoming[incoming == chunks - 1] = -1
    others = [place for place in range(places) if place != places // 2]
    for head, plan in enumerate(incoming):
        plan[others[: head % places]] = -1
    incoming[:, places // 2] = chunks - 1
    if len(incoming) > 1:
        incoming[0] = -1
    return incoming.view(batch, kv_heads, places)


def loaded_tokens(incoming: torch.Tensor, chunk_size: int, tokens: int) -> Iterator[tuple[int, int, int, int]]:
    """Row, KV head, slot of the buffer and token of the prompt, for all that a plan loads."""
    for row, head, place in incoming.ge(0).nonzero().tolist():
        for offset in range(chunk_size):
            token = incoming[row, head, place].item() * chunk_size + offset
            if token < tokens:
                yield row, head, place * chunk_size + offset, token


def inverse_frequencies(rotary_dim: int, device: str = "cpu") -> torch.Tensor:
    """As Llama has them."""
    return 1 / 10000 ** (torch.arange(0, rotary_dim, 2, device=device).float() / max(rotary_dim, 1))


def overlapping(*shape: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> torch.Tensor:
    """`(..., tokens, width)` normal numbers of a long prompt: each token has all of the one before it but one."""
    numbers = size * torch.randn(*shape[:-2], shape[-2] + shape[-1] - 1)
    return numbers.to(dtype).unfold(-1, shape[-1], 1)


NUM_PLACES, CHUNK_SIZE = 24, 8
PART = slice(4, 4 + NUM_PLACES * CHUNK_SIZE)


def step_tensors(device: str = "cpu") -> dict[str, torch.Tensor]:
    """What a decode step has: 1,000 tokens in chunks of 8, of which 24 fit into the middle of the buffers."""
    width = PART.stop + 4
    return {
        "query": torch.randn(2, 8, 1, 64, device=device),
        "landmarks": torch.randn(2, 2, 125, 64, device=device),
        "mask": torch.rand(2, 2, 125, device=device) < 0.8,
        "held": torch.full((2, 2, NUM_PLACES), -1, device=device),
        "low_rank": torch.randn(2, 1000, 40, device=device),
        "basis": torch.randn(2, 2, 40, 64, device=device) / 40**0.5,
        "inverse_frequencies": inverse_frequencies(64, device),
        "values": torch.randn(2, 2, 1000, 64),
        "keys_buffer": torch.zeros(2, 2, width, 64, device=device),
        "values_buffer": torch.zeros(2, 2, width, 64, device=device),
    }


def select(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The chunks that a step wants, `(batch, kv_heads, places)`."""
    states = tensors["query"], tensors["landmarks"]
    return shadow.select_chunks(*states, num_chunks=NUM_PLACES, scaling=0.125, mask=tensors["mask"])


def step(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    Changes `held` and the buffers. It takes slices by `narrow`: a slice of a fake CUDA tensor asks for a torch that
    was built with CUDA.
    """
    incoming = shadow.plan_chunks(tensors["held"], select(tensors))
    keys, values = (
        tensors[name].narrow(2, PART.start, PART.stop - PART.start) for name in ("keys_buffer", "values_buffer")
    )
    factors = (tensors["low_rank"], tensors["basis"], incoming, tensors["inverse_frequencies"])
    shadow.reconstruct_keys(keys, *factors, chunk_size=CHUNK_SIZE)
    shadow.gather_values(values, tensors["values"], incoming, chunk_size=CHUNK_SIZE)
    return incoming
