"""StreamingLLMCache against a reference that rotates every key anew to its place in the cache, query by query."""

import pytest
import torch
from models import (
    FAMILIES,
    Trace,
    build_model,
    drive,
    generate,
    random_rows,
    random_tokens,
    tiny_model,
)
from reference import Rotation, StreamingLLMPolicy, run_policy, without_rotation
from transformers import PreTrainedModel

from pyramid_cache import StreamingLLMCache
from pyramid_cache.caches import streaming_llm


# One family of every kind of rotary embedding, besides the rest of the table.
ROTATIONS = [*FAMILIES, "llama_linear", "llama_llama3", "llama_yarn"]


def compare_with_reference(
    model: PreTrainedModel,
    trace: Trace,
    rows: list[torch.Tensor],
    window_length: int,
    num_sink_tokens: int,
    prefill: str,
    tolerance: float = 1e-4,
) -> None:
    """Each row of a run with the cache against the reference alone: what is held after each step, and the logits."""
    for index, row in enumerate(rows):
        policy = StreamingLLMPolicy(Rotation(model), len(row), window_length, num_sink_tokens, prefill == "dense")
        with without_rotation(model):
            logits = run_policy(model, torch.cat([row, trace.tokens[index]]), policy)
        ends = torch.tensor([0, *trace.pieces]).cumsum(0)
        for step, wanted in enumerate([policy.held[end] for end in ends.tolist()]):
            for layer in range(model.config.num_hidden_layers):
                for head in range(model.config.num_key_value_heads):
                    assert trace.held(step, layer, index, head) == wanted, f"row {index}, layer {layer}, step {step}"
        torch.testing.assert_close(trace.logits[index], logits[len(row) - 1 + ends], atol=tolerance, rtol=0)


@pytest.mark.parametrize("prefill", ["streaming", "dense"])
@pytest.mark.parametrize("family", ROTATIONS)
def test_three_windows_of_generation(family: str, prefill: str) -> None:
    model, rows = tiny_model(family), random_rows((29,), seed=3)
    cache = StreamingLLMCache(model.config, budget=14, prefill=prefill)
    trace = drive(model, cache, rows, random_tokens(1, 42, seed=4))
    compare_with_reference(model, trace, rows, 14, 4, prefill)


@pytest.mark.parametrize("prefill", ["streaming", "dense"])
@pytest.mark.parametrize("lengths", [(29, 29, 29), (17, 29, 6)], ids=["three", "padded"])
@pytest.mark.parametrize("family", ["llama", "glm4", "llama_yarn"])
def test_batches(family: str, lengths: tuple[int, ...], prefill: str) -> None:
    """In the padded batch one row is longer than the window, one fills it while generating, one starts inside it."""
    model, rows = tiny_model(family), random_rows(lengths, seed=5)
    cache = StreamingLLMCache(model.config, budget=12, prefill=prefill)
    trace = drive(model, cache, rows, random_tokens(len(rows), 30, seed=6))
    compare_with_reference(model, trace, rows, 12, 4, prefill)


@pytest.mark.parametrize("prefill", ["streaming", "dense"])
@pytest.mark.parametrize("num_sink_tokens", [0, 1, 3, 8])
def test_other_numbers_of_sinks(num_sink_tokens: int, prefill: str) -> None:
    model, rows = tiny_model("llama"), random_rows((21, 5), seed=7)
    cache = StreamingLLMCache(model.config, budget=9, num_sink_tokens=num_sink_tokens, prefill=prefill)
    trace = drive(model, cache, rows, random_tokens(2, 20, seed=8))
    compare_with_reference(model, trace, rows, 9, num_sink_tokens, prefill)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 11, 12, 13])
def test_prompts_around_the_sinks_and_the_window(length: int) -> None:
    model, rows = tiny_model("llama"), random_rows((length,), seed=9)
    cache = StreamingLLMCache(model.config, budget=12)
    trace = drive(model, cache, rows, random_tokens(1, 20, seed=10))
    compare_with_reference(model, trace, rows, 12, 4, "streaming")


@pytest.mark.parametrize("prefill", ["streaming", "dense"])
def test_long_prompt(prefill: str) -> None:
    """Longer than any block that the prompt may be read in, and not a multiple of one."""
    model, rows = build_model("llama", num_hidden_layers=2), random_rows((1113, 641), seed=17)
    cache = StreamingLLMCache(model.config, budget=301, prefill=prefill)
    trace = drive(model, cache, rows, random_tokens(2, 3, seed=18))
    compare_with_reference(model, trace, rows, 301, 4, prefill, tolerance=5e-4)


def test_streaming_prefill_is_a_stream_of_single_tokens() -> None:
    """The default: a prompt fed at once gives what the same tokens give one at a time, at every position."""
    model, tokens = tiny_model("llama"), random_tokens(40)
    stream, at_once = (StreamingLLMCache(model.config, budget=11) for _ in range(2))
    with torch.no_grad():
        wanted = torch.cat([model(token.view(1, 1), past_key_values=stream).logits[0] for token in tokens])
        output = model(tokens[None], past_key_values=at_once).logits[0]
    torch.testing.assert_close(output, wanted, atol=1e-4, rtol=0)


def test_prompt_in_pieces() -> None:
    """Several tokens at a time on a cache in use are a stream too."""
    model, tokens = tiny_model("llama"), random_tokens(40)
    cache, whole = (StreamingLLMCache(model.config, budget=11) for _ in range(2))
    with torch.no_grad():
        wanted = model(tokens[None], past_key_values=whole).logits[0]
        output = torch.cat(
            [model(piece[None], past_key_values=cache).logits[0] for piece in tokens.split([7, 6, 17, 10])]
        )
    torch.testing.assert_close(output, wanted, atol=1e-4, rtol=0)
    assert torch.equal(cache.positions(0).sort().values, whole.positions(0).sort().values)


@pytest.mark.parametrize("prefill", ["streaming", "dense"])
@pytest.mark.parametrize("lengths", [(29,), (17, 29, 6)], ids=["one", "padded"])
def test_later_turns_of_several_tokens(lengths: tuple[int, ...], prefill: str) -> None:
    """Whatever the prefill, tokens on top of a cache in use are a stream."""
    model, rows = tiny_model("llama"), random_rows(lengths, seed=15)
    pieces = [1, 1, 9, 1, 13, 2, 1, 30, 1]
    cache = StreamingLLMCache(model.config, budget=12, prefill=prefill)
    trace = drive(model, cache, rows, random_tokens(len(rows), sum(pieces), seed=16), pieces=pieces)
    compare_with_reference(model, trace, rows, 12, 4, prefill)


def test_dense_and_streaming_prefill_differ() -> None:
    model, tokens = tiny_model("llama"), random_tokens(1, 40)
    with torch.no_grad():
        dense = model(tokens, past_key_values=StreamingLLMCache(model.config, budget=12, prefill="dense"))
        streaming = model(tokens, past_key_values=StreamingLLMCache(model.config, budget=12))
        wanted = model(tokens, use_cache=False)
    torch.testing.assert_close(dense.logits, wanted.logits, atol=1e-4, rtol=0)
    assert (dense.logits[:, -1] - streaming.logits[:, -1]).abs().max() > 0.1


def test_a_stream_of_ninety_windows_stays_exact() -> None:
    """Distances inside the cache are what they always were; the reference never leaves the first window."""
    model, rows = tiny_model("llama"), random_rows((5,), seed=11)
    cache = StreamingLLMCache(model.config, budget=8, num_sink_tokens=2)
    trace = drive(model, cache, rows, random_tokens(1, 700, seed=12))
    compare_with_reference(model, trace, rows, 8, 2, "streaming", tolerance=5e-4)


def test_counts() -> None:
    model = tiny_model("llama")
    cache = StreamingLLMCache(model.config, budget=12)
    drive(model, cache, random_rows((30,)), random_tokens(1, 7))
    assert cache.num_kept_tokens() == [12, 12, 12]
    assert cache.get_seq_length() == 37


@pytest.mark.parametrize("prefill", ["streaming", "dense"])
@pytest.mark.parametrize("lengths", [(41,), (23, 41, 7)], ids=["one", "padded"])
def test_eager_attention_gives_the_tokens_of_sdpa(lengths: tuple[int, ...], prefill: str) -> None:
    rows = random_rows(lengths, seed=9)
    sdpa, eager = build_model("llama"), build_model("llama", attention="eager")
    wanted = generate(sdpa, StreamingLLMCache(sdpa.config, budget=12, prefill=prefill), rows, 30)
    output = generate(eager, StreamingLLMCache(eager.config, budget=12, prefill=prefill), rows, 30)
    assert torch.equal(output.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(wanted.logits), atol=1e-4, rtol=0)


@pytest.mark.parametrize("lengths", [(29,), (17, 29, 6)], ids=["one", "padded"])
@pytest.mark.parametrize("family", ["llama", "glm4", "llama_yarn"])
def test_moving_the_base_changes_nothing(
    family: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Angles counted from a base that moves every seven tokens, through single tokens and a later turn."""
    monkeypatch.setattr(streaming_llm, "REBASE_INTERVAL", 7)
    model, rows = tiny_model(family), random_rows(lengths, seed=19)
    cache = StreamingLLMCache(model.config, budget=12)
    pieces = [1] * 20 + [9] + [1] * 15
    trace = drive(model, cache, rows, random_tokens(len(rows), sum(pieces), seed=20), pieces=pieces)
    assert cache.layers[0].base == 70 and cache.layers[0].has_exact_angles
    compare_with_reference(model, trace, rows, 12, 4, "streaming")


@pytest.mark.parametrize("prefill", ["streaming", "dense"])
def test_longrope_keeps_the_short_frequencies(prefill: str) -> None:
    """
    Beyond the original length the model rotates by its long factors. What the cache holds never reaches that far, so it
    must be as if the model had only the short ones; a dense prefill still reads the prompt as the model does.
    """

    def phi3(long_factor: float) -> PreTrainedModel:
        factors = {"short_factor": [1.1] * 8, "long_factor": [long_factor] * 8}
        rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, **factors}
        return build_model(
            "phi3", rope_parameters=rope, max_position_embeddings=128, original_max_position_embeddings=32
        )

    model, short_only = phi3(3.0), phi3(1.1)
    prompt = 23 if prefill == "dense" else 41
    rows, later = random_rows((prompt,), seed=21), random_tokens(1, 40, seed=22)
    caches = [StreamingLLMCache(each.config, budget=12, prefill=prefill) for each in (model, short_only)]
    output, wanted = (drive(each, cache, rows, later) for each, cache in zip((model, short_only), caches, strict=True))
    torch.testing.assert_close(output.logits, wanted.logits, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="budget=33"), torch.no_grad():
        model(rows[0][None], past_key_values=StreamingLLMCache(model.config, budget=33))


@pytest.mark.slow
def test_positions_beyond_the_precision_of_the_model() -> None:
    """
    With one layer, logits depend on the sinks and the window alone: after 100,000 tokens they must be those of a prompt
    that consists of just these. The model's own angles are off by 6e-3 radians there.
    """
    model = build_model("llama", num_hidden_layers=1)
    tokens, later, length = random_tokens(100_000, seed=23), random_tokens(40, seed=24), 64
    cache = StreamingLLMCache(model.config, budget=length)
    with torch.no_grad():
        for piece in tokens.split(20_000):
            model(piece[None], past_key_values=cache, logits_to_keep=1)
        for step in range(len(later)):
            logits = model(later[step].view(1, 1), past_key_values=cache).logits[0, -1]
            stream = torch.cat([tokens, later[: step + 1]])
            held = torch.cat([stream[:4], stream[4 - length :]])
            wanted = model(held[None], use_cache=False).logits[0, -1]
            torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
