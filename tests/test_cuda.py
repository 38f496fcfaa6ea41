"""On a CUDA device: what caches give on the CPU, in memory that is really freed, without waiting for the device."""

import itertools
import warnings
from collections.abc import Iterator

import pytest
import torch
from caches import BUDGETS, CacheCase, every_cache, pair_with_caches
from models import build_model, left_pad, random_rows, random_tokens
from test_compile import check_one_graph
from transformers import Cache, DynamicCache, PreTrainedModel

from pyramid_cache import AdaKVCache, KIVICache, KnormCache
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.ops import decode_packed_attention
from pyramid_cache.ops.packed import segment_starts


DEVICE = "cuda"
pytestmark = pytest.mark.cuda

ROWS = random_rows((40, 23, 31), seed=3)


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """No TF32: float32 on the device must be float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def generate_on(device: str, model: PreTrainedModel, cache: Cache, rows: list[torch.Tensor], **settings):
    """Greedy tokens of padded rows, on the CPU."""
    input_ids, attention_mask = left_pad(rows)
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None} | settings
    output = model.to(device).generate(
        input_ids.to(device), attention_mask=attention_mask.to(device), past_key_values=cache, **settings
    )
    model.to("cpu")
    return output.cpu()


SETTINGS = [{}, {"num_beams": 3}, {"prefill_chunk_size": 16}, {"prompt_lookup_num_tokens": 3}]


@pair_with_caches("setting", itertools.product(BUDGETS, ["llama", "qwen3"], ["sdpa", "eager"]))
def test_tokens_and_positions_of_the_cpu(setting: tuple[str, str, str], case: CacheCase) -> None:
    """float32, padded rows: the same tokens, and the same tokens kept by every head; one row in other modes."""
    budget, name, attention = setting
    model = build_model(name, attention=attention)
    for settings in SETTINGS if setting == ("tight", "llama", "sdpa") else SETTINGS[:1]:
        here, there, rows = case.build(model, budget), case.build(model, budget), ROWS[:1] if settings else ROWS
        wanted = generate_on("cpu", model, here, rows, **settings)
        assert torch.equal(generate_on(DEVICE, model, there, rows, **settings), wanted)
        for layer in range(0 if settings else len(here.layers)):
            assert torch.equal(there.positions(layer).cpu(), here.positions(layer))


@pair_with_caches("setting", itertools.product([torch.bfloat16, torch.float16], [(150, 150), (150, 97)]))
def test_half_precision_keeps_what_float32_keeps(
    setting: tuple[torch.dtype, tuple[int, ...]], case: CacheCase
) -> None:
    """
    One layer's prompt through flash-attention and its log-sum-exps. Rounding may change which of two nearly equal
    tokens stays, hence the tenth.
    """
    dtype, lengths = setting
    # Weights that have no more digits than they will have.
    model = build_model("llama", head_dim=64, num_hidden_layers=1).to(dtype).float()
    input_ids, attention_mask = left_pad(random_rows(lengths, seed=5))
    settings = {"attention_mask": attention_mask, "position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0)}
    cache, half_cache = case.build(model), case.build(model)
    with torch.no_grad():
        wanted = model(input_ids, past_key_values=cache, **settings).logits[:, -1]
        model.to(DEVICE, dtype)
        settings = {name: tensor.to(DEVICE) for name, tensor in settings.items()}
        found = model(input_ids.to(DEVICE), past_key_values=half_cache, **settings).logits[:, -1].float().cpu()
    assert (found - wanted).abs().max() <= 0.05 * wanted.abs().max()
    mine, theirs = half_cache.positions(0).cpu(), cache.positions(0)
    for row, head in torch.cartesian_prod(torch.arange(mine.shape[0]), torch.arange(mine.shape[1])).tolist():
        one, other = set(mine[row, head].tolist()) - {-1}, set(theirs[row, head].tolist()) - {-1}
        assert len(one) == len(other) and len(one & other) >= 0.9 * len(other)


@every_cache
def test_memory_is_freed(case: CacheCase) -> None:
    """After a prompt the device holds what the cache says it holds, and no more."""
    model = build_model("llama", num_hidden_layers=2, max_position_embeddings=8192).to(DEVICE)
    tokens = random_tokens(1, 4096).to(DEVICE)
    with torch.no_grad():
        model(tokens, past_key_values=case.build(model), logits_to_keep=1)  # kernels and their workspaces
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        cache = case.build(model)
        model(tokens, past_key_values=cache, logits_to_keep=1)
    torch.cuda.synchronize()
    held = sum(sum(roles.values()) for roles in cache.memory().values())
    # Every tensor takes a multiple of 512 bytes; masks and angles of the forward are gone.
    assert held <= torch.cuda.memory_allocated() - before <= held + 512 * 64


@every_cache
def test_steps_wait_for_the_device_no_more_than_with_a_dynamic_cache(case: CacheCase) -> None:
    model = build_model("llama").to(DEVICE)
    input_ids = torch.stack([row[:20] for row in ROWS]).to(DEVICE)

    def count_waits(cache: Cache) -> int:
        waits = 0
        with torch.no_grad():
            model(input_ids, past_key_values=cache)
            for step in range(40):
                tokens = input_ids[:, :1].clone()
                position_ids = torch.full((3, 1), 20 + step, device=DEVICE)
                torch.cuda.set_sync_debug_mode("warn")
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    model(tokens, position_ids=position_ids, past_key_values=cache)
                torch.cuda.set_sync_debug_mode("default")
                waits += sum("synchroniz" in str(warning.message) for warning in caught)
        return waits

    wanted = count_waits(DynamicCache(config=model.config))
    assert count_waits(case.build(model)) <= wanted + case.most_waits(num_layers=3, num_steps=40)


@pair_with_caches("mode", ["default", "reduce-overhead"])
def test_compiled_steps_are_plain_steps(mode: str, case: CacheCase) -> None:
    """Inductor for the device, and CUDA graphs where it makes them."""
    check_one_graph(case, "inductor", device=DEVICE, mode=mode)


@every_cache
def test_a_saved_cache_goes_on_where_the_model_is(case: CacheCase, tmp_path) -> None:
    """Filled on the CPU, saved, loaded onto the device."""
    model = build_model("llama")
    cache = case.build(model)
    wanted = generate_on("cpu", model, cache, ROWS[:1], max_new_tokens=4)
    cache.save(tmp_path / "cache.safetensors")
    source = model if case.from_model else model.config
    loaded = case.cache_class.load(tmp_path / "cache.safetensors", source, device=DEVICE)
    prompt = [torch.cat([wanted[0], ROWS[1]])]
    assert torch.equal(
        generate_on(DEVICE, model, loaded, prompt, max_new_tokens=8),
        generate_on("cpu", model, cache, prompt, max_new_tokens=8),
    )


QUANTIZED = {
    "int8": (KnormCache, {"budget": 12, "eviction_interval": 3, "quantize": "int8", "residual_length": 4}),
    "fp8": (KnormCache, {"budget": 0.5, "eviction_interval": 5, "quantize": "fp8", "residual_length": 6}),
    "kivi2": (KnormCache, {"budget": 1.0, "quantize": "kivi2", "residual_length": 5}),
    "competing": (AdaKVCache, {"budget": 12, "window_size": 4, "quantize": "kivi4", "residual_length": 4}),
    "by channel": (KIVICache, {"nbits": 4, "residual_length": 5, "group_size": 16}),
    "small groups": (KIVICache, {"nbits": 4, "residual_length": 5, "group_size": 8}),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_steps_over_codes_are_those_of_the_cpu(name: str, tmp_path) -> None:
    """The kernel over codes that the CPU has quantised. Groups of 8 tokens are restored by plain PyTorch."""
    cache_class, settings = QUANTIZED[name]
    model = build_model("llama", head_dim=32)
    input_ids, attention_mask = left_pad(ROWS)
    cache = cache_class(model.config, **settings)
    with torch.no_grad():
        model(input_ids, attention_mask=attention_mask, past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = cache_class.load(tmp_path / "cache.safetensors", model.config, device=DEVICE)
    logits = [steps_on(device, model, each, attention_mask) for device, each in (("cpu", cache), (DEVICE, loaded))]
    torch.testing.assert_close(*logits, atol=2e-4, rtol=0)


@torch.no_grad()
def steps_on(
    device: str, model: PreTrainedModel, cache: CompressedCache, attention_mask: torch.Tensor
) -> torch.Tensor:
    """The logits of three tokens one by one, on the CPU."""
    logits, mask = [], attention_mask.to(device)
    model.to(device)
    for token in (5, 6, 7):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        given = {"attention_mask": mask, "position_ids": mask.sum(dim=1, keepdim=True) - 1}
        tokens = torch.full((3, 1), token, device=device)
        logits.append(model(tokens, past_key_values=cache, **given).logits.cpu())
    model.to("cpu")
    return torch.cat(logits)


def test_packed_decoding_takes_neither_memory_nor_time_of_the_host() -> None:
    """bfloat16, 2 rows of 4 KV heads: nothing like a copy of the keys, and no waiting."""
    for lengths in ([9000, 0, 300, 20_000, 64, 1, 4097, 2500], [0] * 8):
        shapes = [(2, 16, 1, 128), (sum(lengths), 128), (sum(lengths), 128), (2, 4, 70, 128), (2, 4, 70, 128)]
        query, *packed, key, value = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for shape in shapes)
        starts = segment_starts(lengths, torch.device(DEVICE))
        arguments = (query, *packed, starts, max(lengths), key[:, :, :33], value[:, :, :33])
        options = {"scaling": 128**-0.5, "softcap": 20.0}
        decode_packed_attention(*arguments, **options)  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = decode_packed_attention(*arguments, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        taken = torch.cuda.max_memory_allocated() - before
        assert found[0].shape == query.shape
        # A logit for each of 4 heads and a sum: 20 bytes beside the 512 of a key and a value; parts of outputs are
        # 516 bytes.
        assert taken <= 20 * (sum(lengths) + 8 * 33) + 516 * 4 * 8 * 128 + 2**16
