"""Attention with its log-sum-exp from every provider, against a float64 softmax over the whole matrix."""

import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from itertools import product
from types import ModuleType, SimpleNamespace
from typing import Any

import exact
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pyramid_cache.ops import lse as lse_module
from pyramid_cache.ops.lse import (
    TORCH_FLASH,
    Attention,
    FlashKernel,
    attention_with_lse,
    can_give_lse,
    cpu_attention_with_lse,
    cudnn_attention,
    efficient_attention,
    flash_attention,
    flash_kernel,
)


# For the output, which is rounded to the dtype, and for the log-sum-exp. In half precision the exponentials of the
# CPU's kernel are off by 6e-5, whatever the length.
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 1e-4), torch.bfloat16: (2e-2, 1e-4)}
# On CUDA, tensor cores cut sums short and multiply float32 in three passes, and exponentials are those of base 2.
CUDA_TOLERANCE = 1e-4
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = list(TOLERANCES)
KEYS = 37
# Columns without a token, for each of three rows of the batch.
PADDINGS: dict[str, tuple[set[int], ...]] = {
    "none": (set(), set(), set()),
    "left": (set(range(11)), set(), set(range(33))),
    # Padding between the turns of a conversation, in front too, and after the end of a row.
    "gaps": (set(range(4)) | set(range(20, 26)), {36}, set(range(30, 34))),
    "empty": (set(), set(range(KEYS)), set(range(5))),
}
ROWS = [KEYS, 9, 1]


def make_call(
    dtype: torch.dtype, padding: str, rows: int, *, value_dim: int = 16, kv_heads: int = 2, device: str = "cpu"
) -> dict[str, Any]:
    """Arguments of `attention_with_lse`: three rows, 6 heads, head_dim 16, strided as models leave them."""
    key_mask = torch.ones(3, KEYS, dtype=torch.bool)
    for row, columns in enumerate(PADDINGS[padding]):
        key_mask[row, list(columns)] = False
    query, key, value = (
        torch.randn(3, length, heads, dim, device=device).to(dtype).transpose(1, 2)
        for length, heads, dim in ((rows, 6, 16), (KEYS, kv_heads, 16), (KEYS, kv_heads, value_dim))
    )
    call = {"query": query, "key": key, "value": value, "scaling": 0.31}
    if padding != "none":
        call |= {"key_mask": key_mask.to(device), "row_present": key_mask.sum(dim=1).tolist()}
    return call


def model_mask(call: dict[str, Any]) -> torch.Tensor:
    """`(batch, 1, rows, keys)` bool as a model passes it to sdpa."""
    query, key = call["query"], call["key"]
    mask = exact.causal(query.shape[2], key.shape[2], call.get("key_mask"), query.device)
    return mask.expand(query.shape[0], -1, -1, -1)


def check(
    found: tuple[torch.Tensor, torch.Tensor] | None,
    call: dict[str, Any],
    softcap: float | None = None,
    *,
    zero_padding: bool = True,
    lse_rtol: float | None = None,
) -> None:
    """Queries of padding must have minus infinity, and zeros where that is promised."""
    assert found is not None
    output, lse = found
    dtype = call["query"].dtype
    output_tolerance, lse_tolerance = (max(each, CUDA_TOLERANCE * output.is_cuda) for each in TOLERANCES[dtype])
    probabilities, wanted_lse = exact.attention(call["query"], call["key"], call["scaling"], model_mask(call), softcap)
    wanted_output = exact.output_of(probabilities, call["value"])
    assert output.dtype == dtype and lse.dtype == torch.float32
    assert output.is_contiguous()
    if "key_mask" in call:
        is_padding = ~call["key_mask"][:, -output.shape[1] :]
        wanted_lse = wanted_lse.masked_fill(is_padding[:, None], -math.inf)
        if zero_padding:
            wanted_output = wanted_output.masked_fill(is_padding[:, :, None, None], 0.0)
    torch.testing.assert_close(output.double(), wanted_output, atol=output_tolerance, rtol=output_tolerance)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=lse_tolerance, rtol=lse_rtol or lse_tolerance)


def output_of_transformers(call: dict[str, Any], mask: torch.Tensor | None) -> torch.Tensor:
    """What the model's own attention function gives."""
    query, key, value = (call[name] for name in ("query", "key", "value"))
    module = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], is_causal=True)
    return sdpa_attention_forward(module, query, key, value, mask, scaling=call["scaling"])[0]


class CountedOps(TorchDispatchMode):
    """Counts the ops that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))

    def attentions(self) -> dict[str, int]:
        return {name: count for name, count in self.counts.items() if "attention" in name}


# On the CPU.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sdpa_on_the_cpu(dtype: torch.dtype) -> None:
    """One kernel, right in float64, and bit for bit the output of transformers with the same mask."""
    for index, (padding, rows, kv_heads) in enumerate(product(PADDINGS, [*ROWS, 2], [6, 2])):
        call = make_call(dtype, padding, rows, kv_heads=kv_heads)
        mask = model_mask(call) if index % 3 else None
        with CountedOps() as ops:
            found = attention_with_lse("sdpa", **call, mask=mask)
        check(found, call, zero_padding=False)
        assert ops.attentions() == {"_scaled_dot_product_flash_attention_for_cpu": 1}
        # transformers makes no mask for plain causality. With a single query and a mask, newer versions lay the heads
        # of a group out as queries.
        if rows > 1:
            is_plain = padding == "none" and rows == KEYS
            wanted = output_of_transformers(call, None if is_plain else model_mask(call))
            assert torch.equal(found[0], wanted) and found[0].stride() == wanted.stride()
    call = make_call(dtype, "left", KEYS)
    compiled = torch.compile(attention_with_lse, backend="eager", fullgraph=True)
    check(compiled("sdpa", **call), call, zero_padding=False)


def test_a_row_without_keys_has_no_log_sum_exp() -> None:
    call = make_call(F32, "none", 5)
    mask = torch.ones(3, 1, 5, KEYS, dtype=torch.bool)
    mask[1, :, 2] = False
    output, lse = cpu_attention_with_lse(call["query"], call["key"], call["value"], 0.31, mask)
    assert (lse[1, :, 2] == -math.inf).all() and (output[1, 2] == 0).all()
    assert lse.isfinite().sum() == 6 * 14


# Flash-attention packages, played by modules with their signatures, layouts and tuples.


class Kernels:
    """Eager attention in float32 with the layouts and conditions of flash-attention, and how often it ran."""

    def __init__(self) -> None:
        self.num_runs = 0
        self.softcaps: list[float] = []

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One sequence `(tokens, heads, dim)`; output likewise, and `(heads, tokens)`."""
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        allowed = exact.causal(q.shape[2], k.shape[2])
        probabilities, lse = exact.attention(q, k, scale, allowed, softcap or None)
        return exact.output_of(probabilities, v)[0].to(q.dtype), lse[0].float()

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: tuple | None, scale: float, causal: bool,
        softcap: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """A batch `(batch, tokens, heads, dim)`; with the ends of its rows, packed tokens `(total, heads, dim)`."""
        self.num_runs += 1
        self.softcaps.append(softcap)
        assert causal and q.shape[-1] == k.shape[-1] == v.shape[-1] and k.stride(-1) == v.stride(-1) == 1
        if ends is None:
            parts = [self.attend(*tensors, scale, softcap) for tensors in zip(q, k, v, strict=True)]
            return torch.stack([output for output, _ in parts]), torch.stack([lse for _, lse in parts])
        query_ends, key_ends, max_queries, max_keys = ends
        assert query_ends.dtype == key_ends.dtype == torch.int32
        assert isinstance(max_queries, int) and isinstance(max_keys, int)
        assert query_ends.diff().max() <= max_queries and key_ends.diff().max() == max_keys
        # With one query at most, the real kernels take for granted that every row has one.
        assert max_queries > 1 or query_ends.diff().eq(1).all()
        assert key_ends[-1] == k.shape[0] and query_ends[-1] <= q.shape[0]
        # What is beyond the ends stays as the allocator left it.
        output, lse = torch.full_like(q, math.nan), torch.full((q.shape[1], q.shape[0]), math.nan)
        for row in range(len(query_ends) - 1):
            queries, keys = slice(*query_ends[row : row + 2].tolist()), slice(*key_ends[row : row + 2].tolist())
            output[queries], lse[:, queries] = self.attend(q[queries], k[keys], v[keys], scale, softcap)
        return output, lse


FA3 = "softmax_scale causal qv q_descale k_descale v_descale window_size attention_chunk softcap num_splits pack_gqa"
# Names in transformers and in Python, the arguments of `flash_attn_func` (those of packed rows follow the first ones),
# which of them asks for the log-sum-exp, and what is returned of it, of the output and of what flash-attn 2 has third.
PACKAGES: dict[str, tuple[str, str, str, str, str | None, Callable]] = {
    "fa2": (
        "flash_attention_2", "flash_attn", "q k v",
        "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs",
        "return_attn_probs", lambda output, lse, third, is_asked: (output, lse, third) if is_asked else output,
    ),
    "fa3": (
        "flash_attention_3", "flash_attn_interface", "q k v", f"{FA3} deterministic sm_margin return_attn_probs",
        "return_attn_probs", lambda output, lse, third, is_asked: (output, lse) if is_asked else output,
    ),
    # The beta of flash-attn 3: the log-sum-exp comes without being asked for, and there is no softcap.
    "early_fa3": (
        "flash_attention_3", "flash_attn_interface", "q k v", "softmax_scale causal deterministic", None,
        lambda output, lse, third, is_asked: (output, lse),
    ),
    # The forward of flash-attn 3 alone.
    "fa3_fwd": (
        "kernels-community/vllm-flash-attn3@v1", "fa3_fwd_interface", "q k v",
        "softmax_scale causal window_size attention_chunk num_splits pack_gqa sm_margin return_attn_probs",
        "return_attn_probs", lambda output, lse, third, is_asked: (output, lse) if is_asked else output,
    ),
    # Always two results, the second None unless asked for.
    "fa4": (
        "flash_attention_4", "flash_attn.cute", "q k v qv",
        "gather_kv_indices softmax_scale causal window_size learnable_sink softcap num_splits pack_gqa deterministic "
        "score_mod mask_mod return_lse",
        "return_lse", lambda output, lse, third, is_asked: (output, lse if is_asked else None),
    ),
}  # fmt: skip


def function_of(name: str, kernels: Kernels, is_packed: bool) -> Callable:
    """A function of a package, with its signature."""
    _, _, first, rest, asks, results = PACKAGES[name]
    ends = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"] if is_packed else []
    kind, required = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    names = enumerate([*first.split(), *ends, *rest.split()])
    signature = inspect.Signature(
        [inspect.Parameter(each, kind, default=None if i > 2 else required) for i, each in names]
    )

    def function(*arguments: Any, **named: Any) -> Any:
        given = signature.bind(*arguments, **named).arguments
        packing = tuple(given[each] for each in ends) or None
        settings = given["softmax_scale"], given["causal"], given.get("softcap", 0.0)
        output, lse = kernels.run(*(given[each] for each in "qkv"), packing, *settings)
        third = torch.empty(0, dtype=output.dtype) if is_packed else None  # without dropout
        return results(output, lse, third, bool(given.get(asks)))

    function.__signature__ = signature
    return function


@pytest.fixture
def without_packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No flash-attention package can be imported, and none was looked for."""
    monkeypatch.setattr(lse_module, "_probed", {})
    for module in ("flash_attn", "flash_attn.cute", "flash_attn_interface", "fa3_fwd_interface"):
        monkeypatch.setitem(sys.modules, module, None)
    yield monkeypatch


def install_package(monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[Kernels, FlashKernel]:
    """Makes a package importable, and gives the kernel that the adapter finds for its implementation."""
    implementation, path, *_ = PACKAGES[name]
    kernels, module = Kernels(), ModuleType(path)
    module.flash_attn_func, module.flash_attn_varlen_func = (function_of(name, kernels, packed) for packed in (0, 1))
    monkeypatch.setitem(sys.modules, path, module)
    if "." in path:  # flash-attn 4 comes in a `flash_attn` that holds nothing else
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    kernel = flash_kernel(implementation)
    assert kernel is not None and kernel.name == path
    return kernels, kernel


@pytest.mark.parametrize("name", PACKAGES)
def test_packages(without_packages: pytest.MonkeyPatch, name: str) -> None:
    kernels, kernel = install_package(without_packages, name)
    for padding, rows in product(PADDINGS, ROWS):
        call = make_call(F32, padding, rows)
        kernels.num_runs = 0
        check(flash_attention(kernel, Attention(**call)), call)
        assert kernels.num_runs == 1
    assert kernel.has_softcap == (name in ("fa2", "fa3", "fa4"))
    for padding, dtype, rows in (("none", BF16, KEYS), ("gaps", BF16, 9), ("none", F16, 9), ("gaps", F16, KEYS)):
        # Narrow values, counts that only the device knows, and keys in a layout that no kernel reads.
        call = make_call(dtype, padding, rows, value_dim=5)
        call.pop("row_present", None)
        call["key"] = call["key"].transpose(2, 3).contiguous().transpose(2, 3)
        softcap = 1.5 if kernel.has_softcap else None
        check(flash_attention(kernel, Attention(**call, softcap=softcap)), call, softcap)
        assert kernels.softcaps[-1] == (softcap or 0.0)
    # Full rows are not packed.
    call = make_call(F32, "none", 9) | {"key_mask": torch.ones(3, KEYS, dtype=torch.bool), "row_present": [KEYS] * 3}
    with CountedOps() as ops:
        check(flash_attention(kernel, Attention(**call)), call)
    assert "nonzero_static" not in ops.counts


def test_results_of_another_kind_are_refused() -> None:
    call = Attention(**make_call(F32, "none", 9))
    for results in (
        lambda output, lse: output,
        lambda output, lse: (output, None),
        lambda output, lse: (output, lse.bfloat16()),
        lambda output, lse: (output, lse.transpose(1, 2)),
        lambda output, lse: (output.transpose(1, 2), lse),
        lambda output, lse: (output, lse, lse),
    ):
        kernel = FlashKernel(
            "odd_package",
            lambda q, k, v, packing, scaling, cap, give=results: give(*Kernels().run(q, k, v, None, scaling, True)),
            has_softcap=False,
            has_packing=False,
        )
        with pytest.raises(RuntimeError, match="odd_package was expected to return"):
            flash_attention(kernel, call)


# Torch's kernels for CUDA, played by a mode that answers the calls of their ops.


class PlayedOps(TorchDispatchMode):
    """Eager attention with the layouts of torch's ops, on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = Kernels()
        self.played = {
            torch.ops.aten._flash_attention_forward.default: self.flash,
            torch.ops.aten._scaled_dot_product_efficient_attention.default: self.efficient,
            torch.ops.aten._scaled_dot_product_cudnn_attention.default: self.cudnn,
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.played.get(func, func)(*args, **(kwargs or {}))

    def flash(self, q, k, v, query_ends, key_ends, max_q, max_k, dropout_p, is_causal, debug, *, scale) -> tuple:
        """BSHD; bottom-right."""
        assert dropout_p == 0.0 and not debug
        ends = (query_ends, key_ends, max_q, max_k)
        if query_ends is None:
            assert ends == (None, None, q.shape[1], k.shape[1])
            ends = None
        output, lse = self.kernels.run(q, k, v, ends, scale, is_causal)
        return output, lse, torch.empty(2, dtype=torch.int64), torch.empty(()), torch.empty(0, dtype=q.dtype)

    def efficient(self, q, k, v, bias, gives_lse, dropout_p=0.0, is_causal=False, *, scale) -> tuple:
        """BHSD, as many KV heads as heads; causality top-left; rows of the log-sum-exp rounded up to 32."""
        self.kernels.num_runs += 1
        assert gives_lse and dropout_p == 0.0 and q.shape[1] == k.shape[1] == v.shape[1]
        logits = q.float() @ k.float().transpose(2, 3) * scale
        if bias is not None:
            assert bias.shape == logits.shape and bias.dtype == q.dtype
            logits = logits + bias.float()
        if is_causal:
            logits = logits.masked_fill(torch.ones(logits.shape[2:], dtype=torch.bool).triu(1), -math.inf)
        output = (logits.softmax(dim=-1) @ v.float()).to(q.dtype)
        lse = torch.full((*q.shape[:2], -(-q.shape[2] // 32) * 32), math.inf)
        lse[:, :, : q.shape[2]] = logits.logsumexp(dim=-1)
        return output.transpose(1, 2).contiguous().transpose(1, 2), lse, torch.empty(()), torch.empty(())

    def cudnn(self, q, k, v, bias, gives_lse, dropout_p=0.0, is_causal=False, debug=False, *, scale) -> tuple:
        """BHSD, laid out as the query; log-sum-exps with a last dimension of 1, as cuDNN leaves some of them."""
        assert bias is None and gives_lse and dropout_p == 0.0 and is_causal and not debug
        assert q.shape[2] == k.shape[2], "cuDNN aligns causality top-left"
        self.kernels.num_runs += 1
        pairs = zip(*(tensor.transpose(1, 2) for tensor in (q, k, v)), strict=True)
        outputs, lses = zip(*(self.kernels.attend(*tensors, scale, 0.0) for tensors in pairs), strict=True)
        lse = torch.stack([lse.T.contiguous().T for lse in lses])[..., None]
        return torch.stack(outputs).transpose(1, 2), lse, None, None, q.shape[2], k.shape[2], None, None, None


@pytest.mark.parametrize("kind", ["flash", "efficient", "cudnn"])
def test_kernels_of_torch(kind: str) -> None:
    run = {
        "flash": functools.partial(flash_attention, TORCH_FLASH),
        "efficient": efficient_attention,
        "cudnn": cudnn_attention,
    }[kind]
    cases = [("none", KEYS)] if kind == "cudnn" else list(product(PADDINGS, ROWS))
    for (padding, rows), kv_heads in product(cases, [6, 2]):
        # Values as wide as keys and narrower, with the mask and without it.
        call = make_call(F32, padding, rows, value_dim=16 if kv_heads == 6 else 8, kv_heads=kv_heads)
        has_mask = kind != "cudnn" and (rows + kv_heads) % 3 != 0
        with PlayedOps() as ops:
            found = run(Attention(**call, mask=model_mask(call) if has_mask else None))
        check(found, call)
        assert found[1].is_contiguous() and ops.kernels.num_runs == 1


# Which provider takes what.


def test_no_provider_on_the_cpu() -> None:
    for implementation, changes in (
        ("sdpa", {"dtype": torch.float64}),
        ("sdpa", {"value_dim": 8}),
        ("sdpa", {"softcap": 30.0}),
        ("sdpa", {"mask": torch.zeros(1, 1, KEYS, KEYS)}),
        ("sdpa", {"needs_grad": True}),
        ("sdpa", {"autocast": BF16}),
        ("eager", {}),
        ("paged|sdpa", {}),
        ("flex_attention", {}),
        ("flash_attention_2", {}),  # on the CPU
    ):
        call = make_call(changes.get("dtype", F32), "none", KEYS, value_dim=changes.get("value_dim", 16))
        call |= {name: changes[name] for name in ("mask", "softcap") if name in changes}
        call["query"].requires_grad_(changes.get("needs_grad", False))
        with torch.autocast("cpu", dtype=changes.get("autocast"), enabled="autocast" in changes):
            assert attention_with_lse(implementation, **call) is None, (implementation, changes)
    call = make_call(F32, "none", KEYS)
    with torch.nn.attention.sdpa_kernel(SDPBackend.MATH):  # the user turned the others off
        assert attention_with_lse("sdpa", **call) is None
    assert attention_with_lse("sdpa", **call) is not None


@pytest.fixture
def fake_device(without_packages: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Tensors without storage on a CUDA device that is thought to run torch's flash kernels."""
    without_packages.setattr(lse_module, "_has_torch_flash", lambda device: True)
    without_packages.setattr(torch.backends.cudnn, "is_available", lambda: False)
    with FakeTensorMode():
        yield without_packages


def as_fake(call: dict[str, Any], device: str) -> dict[str, Any]:
    """The same call with fake tensors on a device."""
    return {
        name: torch.empty(value.shape, dtype=value.dtype, device=device) if isinstance(value, torch.Tensor) else value
        for name, value in call.items()
    }


# Builds of torch without CUDA refuse to index even fake tensors on it.
FAKE_DEVICES = ["cpu"] if torch.version.cuda is None else ["cpu", "cuda"]
CHOICES = [
    ("sdpa", None, BF16, {}, True),
    ("sdpa", None, F32, {}, True),
    ("sdpa", None, torch.float64, {}, False),
    ("sdpa", None, BF16, {"softcap": 30.0}, False),
    ("sdpa", None, BF16, {"head_dim": 20}, False),
    ("sdpa", None, BF16, {"head_dim": 264}, False),
    ("flash_attention_2", None, BF16, {}, True),
    ("flash_attention_2", None, F32, {}, False),
    ("flash_attention_2", None, BF16, {"softcap": 30.0}, False),
    ("flash_attention_2", "fa2", BF16, {"softcap": 30.0}, True),
    ("flash_attention_2", "fa2", BF16, {"head_dim": 20}, True),
    ("flash_attention_2", "fa2", BF16, {"value_dim": 24}, False),
    ("kernels-community/flash-attn2", None, F16, {}, True),
    ("kernels-community/flash-attn2@v1", None, F16, {}, True),
    ("flash_attention_3", None, BF16, {}, False),
    ("flash_attention_3", "early_fa3", BF16, {"softcap": 30.0}, False),
    ("flash_attention_3", "fa3_fwd", BF16, {}, True),
    ("flash_attention_3", "fa3_fwd", F16, {}, False),
    ("flash_attention_4", None, BF16, {}, False),
    ("flash_attention_4", "fa4", BF16, {}, True),
    ("flash_attention_2", "fa4", BF16, {}, True),  # torch's own
    ("flash_attention_2", "fa4", BF16, {"softcap": 30.0}, False),
    ("paged|flash_attention_2", "fa2", BF16, {}, False),
    ("someone/flash-attn2", "fa2", BF16, {}, False),
    ("eager", "fa2", BF16, {}, False),
]


def test_choice_on_cuda(fake_device: pytest.MonkeyPatch) -> None:
    for implementation, package, dtype, changes, is_given in CHOICES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lse_module, "_probed", {})
            if package is not None:
                install_package(patch, package)
            head_dim = changes.get("head_dim", 16)
            query, key = (torch.empty(2, heads, KEYS, head_dim, dtype=dtype, device="cuda") for heads in (6, 2))
            value = torch.empty(2, 2, KEYS, changes.get("value_dim", head_dim), dtype=dtype, device="cuda")
            found = can_give_lse(implementation, query, key, value, softcap=changes.get("softcap"))
            assert found == is_given, (implementation, package, dtype, changes)


@pytest.mark.parametrize("device", FAKE_DEVICES)
def test_torch_on_cuda_asks_nothing_of_the_device(fake_device: pytest.MonkeyPatch, device: str) -> None:
    """Fake tensors have no values: whatever waited for one would raise."""
    flash = functools.partial(flash_attention, TORCH_FLASH), "_flash_attention_forward"
    efficient = efficient_attention, "_scaled_dot_product_efficient_attention"
    cases = list(product(["none", "gaps"], [(BF16, 8, *flash), (F16, 16, *flash), (F32, 16, *efficient)], ROWS))
    cases.append(("none", (BF16, 16, cudnn_attention, "_scaled_dot_product_cudnn_attention"), KEYS))
    for padding, (dtype, value_dim, run, kernel), rows in cases:
        call = as_fake(make_call(dtype, "none", rows, value_dim=value_dim), device)
        if padding != "none":
            call |= {"key_mask": torch.empty(3, KEYS, dtype=torch.bool, device=device), "row_present": [27, 36, 33]}
        with CountedOps() as ops:
            if device == "cpu" or run is cudnn_attention:  # what the choice gives on CUDA takes tensors of any device
                output, lse = run(Attention(**call))
            else:
                output, lse = attention_with_lse("sdpa", **call)
        assert output.shape == (3, rows, 6, value_dim) and output.dtype == dtype and output.is_contiguous()
        assert lse.shape == (3, 6, rows) and lse.dtype == torch.float32 and lse.is_contiguous()
        assert ops.attentions() == {kernel: 1} and lse.device.type == output.device.type == device
    with pytest.raises(DataDependentOutputException):
        call = as_fake(make_call(BF16, "gaps", 9), device) | {"row_present": None}
        flash_attention(TORCH_FLASH, Attention(**call))


def test_cudnn_where_torch_chooses_it(fake_device: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    answer = SDPBackend.CUDNN_ATTENTION
    fake_device.setattr(torch.backends.cudnn, "is_available", lambda: True)
    fake_device.setattr(torch, "_fused_sdp_choice", lambda *states, **given: asked.append(given) or answer.value)

    def provider_of(implementation: str, dtype: torch.dtype, rows: int, kv_heads: int = 2, **masks: tuple) -> Callable:
        call = as_fake(make_call(dtype, "none", rows, kv_heads=kv_heads), "cuda")
        call |= {name: torch.empty(shape, dtype=torch.bool, device="cuda") for name, shape in masks.items()}
        tensors = [call.get(name) for name in ("query", "key", "value", "mask", "key_mask")]
        return lse_module._choose(implementation, *tensors, None)

    for dtype, kv_heads in product([BF16, F16], [6, 2]):
        assert provider_of("sdpa", dtype, KEYS, kv_heads) is cudnn_attention
        assert asked.pop() == {"is_causal": True, "enable_gqa": kv_heads != 6}
    for implementation, dtype, rows, masks in (
        ("sdpa", BF16, 9, {}),  # causal from the bottom right
        ("sdpa", BF16, KEYS, {"key_mask": (3, KEYS)}),
        ("sdpa", BF16, KEYS, {"mask": (1, 1, KEYS, KEYS)}),
        ("sdpa", F32, KEYS, {}),
        ("flash_attention_2", BF16, KEYS, {}),
    ):
        assert provider_of(implementation, dtype, rows, **masks) not in (None, cudnn_attention)
        assert asked == []  # cuDNN cannot do it
    for answer in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):  # noqa: B007
        provider = provider_of("sdpa", BF16, KEYS)
        assert provider.func is flash_attention and provider.args == (TORCH_FLASH,)


def test_bias_of_the_efficient_kernel_is_aligned() -> None:
    for keys in (KEYS, 48):
        allowed = exact.causal(9, keys).expand(3, 1, 9, keys)
        bias = lse_module._additive_bias(allowed, torch.empty(3, 6, 9, 16))
        assert torch.equal(bias.exp(), allowed.expand(3, 6, 9, keys).float())
        assert all(stride % 16 == 0 for stride in bias.stride()[:3]) and bias.stride(1) == 0


def test_schemas_of_torch() -> None:
    """The adapter passes arguments of these private ops by position."""
    states, bias = "query key value", "attn_bias compute_log_sumexp dropout_p is_causal"
    for name, arguments in {
        "_flash_attention_forward": "cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask scale",
        "_scaled_dot_product_efficient_attention": f"{bias} scale",
        "_scaled_dot_product_cudnn_attention": f"{bias} return_debug_mask scale",
        "_fused_sdp_choice": "attn_mask dropout_p is_causal scale enable_gqa",
    }.items():
        schema = getattr(torch.ops.aten, name).default._schema.arguments
        wanted = f"{states} {arguments}".split()
        assert [argument.name for argument in schema[: len(wanted)]] == wanted, name
        assert all(argument.has_default_value() for argument in schema[len(wanted) :]), name


def test_shapes_that_do_not_fit_are_refused() -> None:
    """The kernels would read beyond the end of the tensors."""
    states = {"query": torch.zeros(2, 6, 5, 16), "key": torch.zeros(2, 2, 9, 16), "value": torch.zeros(2, 2, 9, 16)}
    for change, message in (
        ({"query": torch.zeros(2, 5, 16)}, "`query` must have the shape"),
        ({"query": torch.zeros(1, 6, 5, 16)}, r"`key` must have the shape \(1, any, any, 16\)"),
        ({"query": torch.zeros(2, 5, 5, 16)}, "5 query heads cannot share 2 KV heads"),
        ({"query": torch.zeros(2, 6, 0, 16)}, "0 query rows cannot be the last ones of 9 keys"),
        ({"query": torch.zeros(2, 6, 10, 16)}, "10 query rows cannot be the last ones of 9 keys"),
        ({"value": torch.zeros(2, 2, 8, 16)}, r"`value` must have the shape \(2, 2, 9, any\)"),
        ({"value": torch.zeros(2, 1, 9, 16)}, r"`value` must have the shape \(2, 2, 9, any\)"),
        ({"mask": torch.ones(2, 1, 5, 8).bool()}, r"`mask` must have the shape \(any, 1, 5, 9\)"),
        ({"mask": torch.ones(3, 1, 5, 9).bool()}, r"`mask` must have the shape \(2, 1, 5, 9\)"),
        ({"key_mask": torch.ones(2, 8).bool()}, r"`key_mask` must have the shape \(2, 9\)"),
        ({"key_mask": torch.ones(2, 9)}, "`key_mask` must be torch.bool"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_with_lse("sdpa", **(states | change), scaling=1.0)


# On a GPU.


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4"])
def test_on_cuda(implementation: str, dtype: torch.dtype) -> None:
    for padding, rows in product(PADDINGS, ROWS):
        call = make_call(dtype, padding, rows, device="cuda")
        if not can_give_lse(implementation, call["query"], call["key"], call["value"], key_mask=call.get("key_mask")):
            assert implementation != "sdpa" and (implementation != "flash_attention_2" or dtype == F32)
            pytest.skip(f"no provider for {implementation} in {dtype} on this machine")
        # The first call may load a kernel, which waits.
        attention_with_lse(implementation, **call)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = attention_with_lse(implementation, **call)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        check(found, call)
        if implementation == "sdpa" and rows == KEYS:
            mask = None if padding == "none" else model_mask(call)
            wanted, (output, _) = output_of_transformers(call, mask), attention_with_lse("sdpa", **call, mask=mask)
            is_token = call.get("key_mask", torch.ones(3, KEYS, dtype=torch.bool, device="cuda"))
            tolerance = max(TOLERANCES[dtype][0], CUDA_TOLERANCE)
            torch.testing.assert_close(output[is_token], wanted[is_token], atol=tolerance, rtol=tolerance)
        if dtype == BF16 and padding == "gaps":
            check(efficient_attention(Attention(**call)), call)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_long_prompts_on_cuda(dtype: torch.dtype) -> None:
    """Where torch itself runs cuDNN, as on an H100, the same output as without log-sum-exps; and with padding."""
    for kv_heads, head_dim, length in product([8, 2, 1], [64, 80, 128, 256], [1500, 1536, 129]):
        query = torch.randn(2, length, 8, head_dim, device="cuda", dtype=dtype).transpose(1, 2)
        key, value = (torch.randn(2, kv_heads, length, head_dim, device="cuda", dtype=dtype) for _ in range(2))
        call = {"query": query, "key": key, "value": value, "scaling": head_dim**-0.5}
        if lse_module._is_cudnn_chosen(query, key, value):
            with CountedOps() as ops:
                found = attention_with_lse("sdpa", **call)
            assert ops.attentions() == {"_scaled_dot_product_cudnn_attention": 1}
            check(found, call, lse_rtol=1e-5)
            tolerance = TOLERANCES[dtype][0]
            torch.testing.assert_close(found[0], output_of_transformers(call, None), atol=tolerance, rtol=tolerance)
        key_mask = torch.arange(length, device="cuda") >= torch.tensor([[length // 2], [0]], device="cuda")
        call |= {"key_mask": key_mask, "row_present": [length - length // 2, length]}
        for rows in (length, 64):
            call["query"] = query[:, :, -rows:]
            check(attention_with_lse("sdpa", **call), call, lse_rtol=1e-5)
