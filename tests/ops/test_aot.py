"""
Every Triton kernel compiled without a GPU: none may spill registers or ask for too much shared memory.

The ops are called with tensors without contents and the launches are caught, so that what is compiled has the
arguments, the block sizes and the specialisation that a GPU would be given. An op that looked into a tensor first
would fail.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


triton = pytest.importorskip("triton", reason="there is no Triton to compile with")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("in the interpreter nothing is compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from pyramid_cache.engine.quantization import Quantizer  # noqa: E402
from pyramid_cache.ops import triton_decode, triton_quantized, triton_scores, triton_shadow  # noqa: E402


# Bytes of shared memory that one block may have, by compute capability. An A100 (8.0) has 166,912; GPUs of capability
# 8.6 and 8.9 run the same code and have less.
SHARED_MEMORY = {80: 101_376, 90: 232_448}
POINTER_TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.bool: "*i1"}
POINTER_TYPES |= {torch.int8: "*i8", torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")


class Launch:
    """A launch of a kernel with its arguments, and options of the compiler among them, as the compiler sees it."""

    def __init__(self, kernel: JITFunction, arguments: tuple, named: dict) -> None:
        self.kernel = kernel
        self.options = {name: named[name] for name in OPTIONS if name in named}
        named = {name: value for name, value in named.items() if name not in OPTIONS}
        bound = kernel.signature.bind(*arguments, **named)
        bound.apply_defaults()
        self.signature, self.constants, self.attributes = {}, {}, {}
        for index, parameter in enumerate(kernel.params):
            value = bound.arguments[parameter.name]
            is_specialized = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (is_specialized and type(value) is int and value == 1):
                self.signature[parameter.name], self.constants[parameter.name] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                self.signature[parameter.name], number = POINTER_TYPES[value.dtype], value.data_ptr()
            elif isinstance(value, float):
                self.signature[parameter.name], number = "fp32", 1
            else:
                self.signature[parameter.name], number = ("i32" if -(2**31) <= value < 2**31 else "i64"), value
            if is_specialized and number % 16 == 0:
                self.attributes[(index,)] = [["tt.divisibility", 16]]

    @property
    def key(self) -> tuple:
        """What a kernel is compiled anew for when it changes."""
        return (
            self.kernel.fn.__name__,
            *(tuple(sorted(part.items())) for part in (self.signature, self.constants, self.options)),
            tuple(sorted(self.attributes)),
        )

    def compile(self, capability: int) -> dict[str, int]:
        """The registers, bytes of stack and of shared memory on a GPU of this capability."""
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)
        return {**resource_usage(compiled.asm["cubin"]), "shared": compiled.metadata.shared}


def resource_usage(cubin: bytes) -> dict[str, int]:
    """What NVIDIA's own tool says of a binary. Spilled registers lie on the stack."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    used = {name.lower(): int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    assert set(used) == {"reg", "stack", "local"}, text
    return used


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without contents."""
    return torch.empty(*shape, dtype=dtype, device="meta")


# Each function calls an op as a cache does, with tensors without contents: 8 query heads over 2 KV heads, two rows.


def run_scores(dtype: torch.dtype, head_dim: int, keys: int, rows: int = 0, **options) -> None:
    rows = rows or keys
    query = empty(2, keys, 8, head_dim, dtype=dtype).transpose(1, 2)[:, :, keys - rows :]
    key, lse = empty(2, 2, keys, head_dim, dtype=dtype), empty(2, 8, keys)[..., keys - rows :]
    weights = empty(1, rows) if options.get("weights") else None
    start = empty(2, dtype=torch.int32) if options.get("start") else None
    triton_scores.attention_scores(query, key, lse, weights, start, 0.1, options.get("softcap"))


def decode_states(dtype: torch.dtype, head_dim: int, slots: int, group: int = 4) -> list[torch.Tensor]:
    return [empty(2, 2 * group, 1, head_dim, dtype=dtype), *(empty(2, 2, slots, head_dim, dtype=dtype) for _ in "kv")]


def run_decode(
    dtype: torch.dtype, head_dim: int, slots: int, group: int = 4, mask: bool = False, bias: bool = False
) -> None:
    states = decode_states(dtype, head_dim, slots, group)
    is_held, sinks = (empty(2, 1, slots, dtype=torch.bool), empty(2 * group)) if mask else (None, None)
    biases = empty(2, 2, slots) if bias else None
    triton_decode.decode_attention(*states, is_held, biases, sinks, 0.1, None)


def run_packed(
    dtype: torch.dtype,
    head_dim: int,
    longest: int,
    group: int = 4,
    softcap: float | None = None,
    mask: bool = False,
    bias: bool = False,
) -> None:
    """The latest tokens are in some of 64 slots; with a mask there is a place for each of these, as when compiled."""
    lengths = [longest, longest // 7, 0, 17]
    packed_key, packed_value = (empty(sum(lengths), head_dim, dtype=dtype) for _ in range(2))
    query, key, value = decode_states(dtype, head_dim, 64, group)
    latest = (tensor[:, :, : 64 if mask else 1 + longest % 64] for tensor in (key, value))
    starts, is_held = empty(5, dtype=torch.int64), empty(2, 2, 64, dtype=torch.bool) if mask else None
    biases = empty(sum(lengths)) if bias else None
    triton_decode.decode_packed_attention(
        query, packed_key, packed_value, starts, longest, *latest, 0.1, softcap, is_held, biases
    )


def run_quantized(
    dtype: torch.dtype,
    head_dim: int,
    slots: int,
    format_name: str,
    group: int = 4,
    channel_group: int = 0,
    packed: bool = False,
    mask: bool = False,
    bias: bool = False,
) -> None:
    """The latest tokens are in some of 192 slots."""
    quantizer = Quantizer(format_name, 128, channel_group)
    slots = slots // channel_group * channel_group if channel_group else slots
    shape = (2, 1, 2 * slots, head_dim) if packed else (2, 2, slots, head_dim)
    coded = (quantizer.coded(name, *quantizer.stored(name, empty(*shape))) for name in ("keys", "values"))
    query, *states = decode_states(dtype, head_dim, 192, group)
    latest = [each[:, :, : 128 + slots % 32] for each in states]
    num_slots = slots + latest[0].shape[2]
    is_held = empty(2, 2, num_slots, dtype=torch.bool) if mask else None
    rest = is_held, empty(2, 2, num_slots) if bias else None, None, empty(2, 3, dtype=torch.int64) if packed else None
    triton_quantized.decode_quantized_attention(query, *coded, slots, *latest, *rest, 0.1, None)


def run_shadow(dtype: torch.dtype, head_dim: int, tokens: int) -> None:
    buffer = empty(2, 2, 1024, head_dim, dtype=dtype)
    incoming = triton_shadow.plan_chunks(*(empty(2, 2, 128, dtype=torch.int64) for _ in range(2)))
    low_rank, basis = empty(2, tokens, 160, dtype=dtype), empty(2, 2, 160, head_dim, dtype=dtype)
    for factors in (low_rank, low_rank.to(torch.int8)):
        triton_shadow.reconstruct_keys(buffer, factors, basis, incoming, empty(head_dim // 2), False, 8)
    triton_shadow.gather_values(buffer, empty(2, 2, tokens, head_dim, dtype=dtype), incoming, 8)


# Functions with a length and options, which together launch every kernel. A module of kernels joins the tests here.
CALLS: dict[str, tuple[Callable, int, dict[str, Any]]] = {
    "all rows": (run_scores, 9000, {}),
    "window": (run_scores, 2000, {"rows": 24, "weights": True, "start": True}),
    "decode": (run_decode, 3000, {"mask": True}),
    "decode with a bias": (run_decode, 3000, {"mask": True, "bias": True}),
    "packed decode": (run_packed, 9000, {}),
    "packed decode with a mask": (run_packed, 9000, {"mask": True}),
    "packed decode with a mask and a bias": (run_packed, 9000, {"mask": True, "bias": True}),
    "shadow": (run_shadow, 9000, {}),
    "kivi4": (run_quantized, 9000, {"format_name": "kivi4"}),
    "kivi4 by channel": (run_quantized, 9000, {"format_name": "kivi4", "channel_group": 32, "mask": True}),
    "kivi2 of packed heads": (run_quantized, 9000, {"format_name": "kivi2", "packed": True, "mask": True}),
    "fp8": (run_quantized, 9000, {"format_name": "fp8", "mask": True, "bias": True}),
}
# Kernels that are no different for other dtypes, and rare options.
RARE_CALLS: dict[str, tuple[Callable, int, dict[str, Any]]] = {
    "small": (run_scores, 300, {}),
    "scores with softcap": (run_scores, 2000, {"softcap": 50.0, "weights": True}),
    "large group": (run_decode, 3000, {"group": 48}),
    "int8": (run_quantized, 9000, {"format_name": "int8"}),
    "kivi2 by channel": (run_quantized, 9000, {"format_name": "kivi2", "channel_group": 32}),
    "fp8 by channel of a large group": (run_quantized, 3000, {"format_name": "fp8", "channel_group": 16, "group": 48}),
    "packed decode of a large group": (run_packed, 3000, {"group": 48, "softcap": 30.0}),
}


def launches_of(name: str, dtype: torch.dtype, head_dim: int, length: int | None = None) -> list[Launch]:
    """What a call launches. None of it runs."""
    call, own_length, options = (CALLS | RARE_CALLS)[name]
    launches = []

    def run(self, *arguments, grid, warmup, **named):
        launches.append(Launch(self, arguments, named))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        call(dtype, head_dim, length or own_length, **options)
    return launches


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile for real, and leave nothing behind."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for module in (triton_scores, triton_decode, triton_quantized):
        monkeypatch.setattr(module, "num_multiprocessors", lambda device: 132)


# What every kernel is compiled for: the usual size, and the one that takes most registers and shared memory.
SIZES = ((torch.bfloat16, 128), (torch.float32, 256))
RARE_SIZES = ((torch.bfloat16, 256),)


@pytest.mark.parametrize(
    "name, dtype, head_dim, capability",
    [
        ("all rows", torch.bfloat16, 128, 90),
        ("decode", torch.bfloat16, 128, 90),
        ("window", torch.float32, 64, 80),
        ("packed decode", torch.bfloat16, 128, 90),
        ("kivi4", torch.bfloat16, 128, 90),
        ("fp8", torch.bfloat16, 128, 80),
        *(
            pytest.param(name, *size, capability, marks=pytest.mark.slow)
            for name in CALLS | RARE_CALLS
            for size in (RARE_SIZES if name in RARE_CALLS else SIZES)
            for capability in SHARED_MEMORY
        ),
    ],
)
def test_kernels_do_not_spill(
    name: str, dtype: torch.dtype, head_dim: int, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a call launches. What it needs is printed."""
    table = triton_scores.HOPPER_SCORE_BLOCKS if capability == 90 else triton_scores.SCORE_BLOCKS
    monkeypatch.setattr(triton_scores, "score_blocks", lambda device: table)
    launches = {launch.key: launch for launch in launches_of(name, dtype, head_dim)}
    assert launches, "nothing was launched"
    for launch in launches.values():
        used = launch.compile(capability)
        print(launch.kernel.fn.__name__, launch.options, used)
        # Triton 3.6 puts two registers of a kernel of fp8 on the stack.
        most = 8 if name == "fp8" and triton.__version__ < "3.9" else 0
        assert used["local"] == 0 and used["stack"] <= most and used["shared"] <= SHARED_MEMORY[capability]


@pytest.mark.slow
def test_spills_are_seen() -> None:
    [launch] = launches_of("all rows", torch.bfloat16, 128)
    launch.options["maxnreg"] = 64
    assert launch.compile(90)["stack"] > 0


def test_no_length_is_compiled_anew() -> None:
    # Multiples of 16 and not, and splits of other numbers: the compiler could take each of them for a case of its own.
    for name in CALLS:
        lengths = (5000, 5001, 5008, 6016, 7777)
        variants = [[launch.key for launch in launches_of(name, torch.float16, 64, length)] for length in lengths]
        assert variants[0]
        assert all(variant == variants[0] for variant in variants), name
