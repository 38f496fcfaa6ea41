"""Attention with its log-sum-exp from every provider, against a float64 softmax over the whole matrix."""

import math
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

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


# Output, which is rounded to the dtype, and log-sum-exp: in half precision, the CPU's kernel takes exponentials that are off by
# 6e-5, whatever the length.
TOLERANCES = {
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2e-3, 1e-4),
    torch.bfloat16: (2e-2, 1e-4),
}
# On CUDA, tensor cores cut sums short and multiply float32 in three passes, and exponentials are those of base 2.
CUDA_TOLERANCE = 1e-4
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
    rows, keys = call["query"].shape[2], call["key"].shape[2]
    allowed = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows).expand(3, 1, rows, keys)
    return allowed & call["key_mask"][:, None, None].cpu() if "key_mask" in call else allowed


def in_float64(call: dict[str, Any], softcap: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `(batch, rows, heads, value_dim)` and log-sum-exp, with NaN in the output for rows that see nothing."""
    query, key, value = (call[name].double().cpu() for name in ("query", "key", "value"))
    group = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(group, dim=1).transpose(2, 3) * call["scaling"]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~model_mask(call), -math.inf)
    output = logits.softmax(dim=-1) @ value.repeat_interleave(group, dim=1)
    return output.transpose(1, 2), logits.logsumexp(dim=-1)


def check(
    found: tuple[torch.Tensor, torch.Tensor],
    call: dict[str, Any],
    softcap: float | None = None,
    *,
    zero_padding: bool = True,
) -> None:
    """Compares with float64; queries of padding must have minus infinity, and zeros where that is promised."""
    output, lse = found
    dtype = call["query"].dtype
    output_tolerance, lse_tolerance = (max(each, CUDA_TOLERANCE * output.is_cuda) for each in TOLERANCES[dtype])
    wanted_output, wanted_lse = in_float64(call, softcap)
    assert output.dtype == dtype and lse.dtype == torch.float32
    assert output.is_contiguous() and lse.shape == wanted_lse.shape and output.shape == wanted_output.shape
    if "key_mask" in call:
        is_padding = ~call["key_mask"][:, -output.shape[1] :].cpu()
        wanted_lse = wanted_lse.masked_fill(is_padding[:, None], -math.inf)
        if zero_padding:
            wanted_output = wanted_output.masked_fill(is_padding[:, :, None, None], 0.0)
    wanted_output = wanted_output.nan_to_num(0.0)
    torch.testing.assert_close(output.double().cpu(), wanted_output, atol=output_tolerance, rtol=output_tolerance)
    torch.testing.assert_close(lse.double().cpu(), wanted_lse, atol=lse_tolerance, rtol=lse_tolerance)


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


@pytest.mark.parametrize("passes_mask", [True, False], ids=["mask", "no_mask"])
@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sdpa_on_the_cpu(dtype: torch.dtype, padding: str, rows: int, kv_heads: int, passes_mask: bool) -> None:
    call = make_call(dtype, padding, rows, kv_heads=kv_heads)
    mask = model_mask(call) if passes_mask else None
    with CountedOps() as ops:
        found = attention_with_lse("sdpa", **call, mask=mask)
    assert found is not None
    check(found, call, zero_padding=False)
    assert ops.attentions() == {"_scaled_dot_product_flash_attention_for_cpu": 1}


@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("rows", [KEYS, 9, 2])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sdpa_on_the_cpu_is_that_of_transformers(dtype: torch.dtype, padding: str, rows: int, kv_heads: int) -> None:
    """Bit for bit. A single query is left out: with a mask, newer versions lay the heads of a group out as queries."""
    call = make_call(dtype, padding, rows, kv_heads=kv_heads)
    # transformers makes no mask where causality is all there is to it.
    mask = None if padding == "none" and rows == KEYS else model_mask(call)
    module = SimpleNamespace(num_key_value_groups=6 // kv_heads, is_causal=True)
    wanted, _ = sdpa_attention_forward(
        module, call["query"], call["key"], call["value"], mask, scaling=call["scaling"]
    )
    output, _ = attention_with_lse("sdpa", **call, mask=mask)
    assert torch.equal(output, wanted) and output.stride() == wanted.stride()


def test_a_row_without_keys_has_no_log_sum_exp() -> None:
    call = make_call(torch.float32, "none", 5)
    mask = torch.ones(3, 1, 5, KEYS, dtype=torch.bool)
    mask[1, :, 2] = False
    output, lse = cpu_attention_with_lse(call["query"], call["key"], call["value"], 0.31, mask)
    assert (lse[1, :, 2] == -math.inf).all() and (output[1, 2] == 0).all()
    assert lse.isfinite().sum() == 6 * 14


def test_sdpa_compiles_into_one_graph() -> None:
    call = make_call(torch.float32, "left", KEYS)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = attention_with_lse("sdpa", query, key, value, scaling=0.31, key_mask=call["key_mask"])
        assert found is not None
        return found

    found = torch.compile(attend, backend="eager", fullgraph=True)(call["query"], call["key"], call["value"])
    check(found, call, zero_padding=False)


# Flash-attention packages, played by modules with their signatures, layouts and tuples.


class Package:
    """What the modules below share: eager attention in float32, and how often it ran."""

    def __init__(self) -> None:
        self.num_runs = 0
        self.softcaps: list[float] = []

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One sequence `(tokens, heads, dim)`; output likewise, and `(heads, tokens)`."""
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        logits = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
        if softcap:
            logits = torch.tanh(logits / softcap) * softcap
        future = torch.ones(logits.shape[1:], dtype=torch.bool).triu(k.shape[0] - q.shape[0] + 1)
        logits = logits.masked_fill(future, -math.inf)
        output = torch.einsum("hqk,khd->qhd", logits.softmax(dim=-1), v.float())
        return output.to(q.dtype), logits.logsumexp(dim=-1)

    def dense(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, softcap: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.num_runs += 1
        self.softcaps.append(softcap)
        assert causal and q.shape[3] == k.shape[3] == v.shape[3] and k.stride(-1) == v.stride(-1) == 1
        parts = [self.attend(*tensors, scale, softcap) for tensors in zip(q, k, v, strict=True)]
        return torch.stack([output for output, _ in parts]), torch.stack([lse for _, lse in parts])

    def packed(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        ends: tuple[torch.Tensor, torch.Tensor, int, int],
        scale: float,
        causal: bool,
        softcap: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.num_runs += 1
        self.softcaps.append(softcap)
        query_ends, key_ends, max_queries, max_keys = ends
        assert causal and query_ends.dtype == key_ends.dtype == torch.int32
        assert isinstance(max_queries, int) and isinstance(max_keys, int)
        assert query_ends.diff().max() <= max_queries and key_ends.diff().max() == max_keys
        # With one query at most, the real kernels take for granted that every row has one.
        assert max_queries > 1 or query_ends.diff().eq(1).all()
        assert key_ends[-1] == k.shape[0] and query_ends[-1] <= q.shape[0]
        # What is beyond the ends stays as the allocator left it.
        output = torch.full_like(q, math.nan)
        lse = torch.full((q.shape[1], q.shape[0]), math.nan)
        for row in range(len(query_ends) - 1):
            queries, keys = slice(*query_ends[row : row + 2].tolist()), slice(*key_ends[row : row + 2].tolist())
            output[queries], lse[:, queries] = self.attend(q[queries], k[keys], v[keys], scale, softcap)
        return output, lse


def flash_attn_2(package: Package) -> dict[str, Callable]:
    """flash-attn 2.8; the third result is None without dropout."""

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        output, lse = package.dense(q, k, v, softmax_scale, causal, softcap)
        return (output, lse, None) if return_attn_probs else output

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        ends = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        output, lse = package.packed(q, k, v, ends, softmax_scale, causal, softcap)
        return (output, lse, torch.empty(0, dtype=q.dtype)) if return_attn_probs else output

    return {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}


def flash_attn_3(package: Package) -> dict[str, Callable]:
    """flash-attn 3 as of 2025."""

    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        output, lse = package.dense(q, k, v, softmax_scale, causal, softcap)
        return (output, lse) if return_attn_probs else output

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        ends = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        output, lse = package.packed(q, k, v, ends, softmax_scale, causal, softcap)
        return (output, lse) if return_attn_probs else output

    return {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}


def early_flash_attn_3(package: Package) -> dict[str, Callable]:
    """The beta of flash-attn 3: the log-sum-exp comes without being asked for, and there is no softcap."""

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, deterministic=False):
        return package.dense(q, k, v, softmax_scale, causal)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
        deterministic=False,
    ):  # fmt: skip
        ends = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return package.packed(q, k, v, ends, softmax_scale, causal)

    return {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}


def fa3_fwd(package: Package) -> dict[str, Callable]:
    """The forward of flash-attn 3 alone."""

    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, num_splits=1,
        pack_gqa=None, sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        output, lse = package.dense(q, k, v, softmax_scale, causal)
        return (output, lse) if return_attn_probs else output

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, num_splits=1, pack_gqa=None,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        ends = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        output, lse = package.packed(q, k, v, ends, softmax_scale, causal)
        return (output, lse) if return_attn_probs else output

    return {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}


def flash_attn_4(package: Package) -> dict[str, Callable]:
    """flash-attn 4: always two results, the second None unless asked for."""

    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
        mask_mod=None, return_lse=False,
    ):  # fmt: skip
        output, lse = package.dense(q, k, v, softmax_scale, causal, softcap)
        return output, lse if return_lse else None

    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, seqused_q=None, seqused_k=None, softmax_scale=None, causal=False,
        window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
        deterministic=False, score_mod=None, mask_mod=None, return_lse=False,
    ):  # fmt: skip
        ends = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        output, lse = package.packed(q, k, v, ends, softmax_scale, causal, softcap)
        return output, lse if return_lse else None

    return {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}


# Implementation, module and functions.
PACKAGES: dict[str, tuple[str, str, Callable[[Package], dict[str, Callable]]]] = {
    "fa2": ("flash_attention_2", "flash_attn", flash_attn_2),
    "fa3": ("flash_attention_3", "flash_attn_interface", flash_attn_3),
    "early_fa3": ("flash_attention_3", "flash_attn_interface", early_flash_attn_3),
    "fa3_fwd": ("kernels-community/vllm-flash-attn3@v1", "fa3_fwd_interface", fa3_fwd),
    "fa4": ("flash_attention_4", "flash_attn.cute", flash_attn_4),
}
HAS_SOFTCAP = ("fa2", "fa3", "fa4")


@pytest.fixture
def without_packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No flash-attention package can be imported, and none was looked for."""
    monkeypatch.setattr(lse_module, "_probed", {})
    for module in ("flash_attn", "flash_attn.cute", "flash_attn_interface", "fa3_fwd_interface"):
        monkeypatch.setitem(sys.modules, module, None)
    yield monkeypatch


def install_package(monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[Package, FlashKernel]:
    """Makes a package importable, and gives the kernel that the adapter finds for its implementation."""
    implementation, module_name, functions = PACKAGES[name]
    package, module = Package(), ModuleType(module_name)
    vars(module).update(functions(package))
    monkeypatch.setitem(sys.modules, module_name, module)
    if "." in module_name:  # flash-attn 4 comes in a `flash_attn` that holds nothing else
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    kernel = flash_kernel(implementation)
    assert kernel is not None and kernel.name == module_name
    return package, kernel


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", PACKAGES)
def test_packages(without_packages: pytest.MonkeyPatch, name: str, padding: str, rows: int) -> None:
    package, kernel = install_package(without_packages, name)
    call = make_call(torch.float32, padding, rows)
    check(flash_attention(kernel, Attention(**call)), call)
    assert package.num_runs == 1


@pytest.mark.parametrize("rows", [KEYS, 9])
@pytest.mark.parametrize("padding", ["none", "gaps"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_values_and_counts_that_only_the_device_knows(
    without_packages: pytest.MonkeyPatch, dtype: torch.dtype, padding: str, rows: int
) -> None:
    _, kernel = install_package(without_packages, "fa2")
    call = make_call(dtype, padding, rows, value_dim=5)
    call.pop("row_present", None)
    # Keys in a layout that no kernel reads.
    call["key"] = call["key"].transpose(2, 3).contiguous().transpose(2, 3)
    check(flash_attention(kernel, Attention(**call)), call)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", HAS_SOFTCAP)
def test_softcap(without_packages: pytest.MonkeyPatch, name: str, padding: str) -> None:
    package, kernel = install_package(without_packages, name)
    call = make_call(torch.float32, padding, 9)
    check(flash_attention(kernel, Attention(**call, softcap=1.5)), call, softcap=1.5)
    assert package.softcaps == [1.5]


def test_full_rows_are_not_packed(without_packages: pytest.MonkeyPatch) -> None:
    _, kernel = install_package(without_packages, "fa2")
    call = make_call(torch.float32, "none", 9)
    call |= {"key_mask": torch.ones(3, KEYS, dtype=torch.bool), "row_present": [KEYS] * 3}
    with CountedOps() as ops:
        found = flash_attention(kernel, Attention(**call))
    check(found, call)
    assert "nonzero_static" not in ops.counts


# Torch's kernels for CUDA, played by a mode that answers the calls of their ops.


class PlayedOps(TorchDispatchMode):
    """Eager attention with the layouts of torch's ops, on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.package = Package()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._flash_attention_forward.default:
            return self.flash(*args, **kwargs)
        if func is torch.ops.aten._scaled_dot_product_efficient_attention.default:
            return self.efficient(*args, **kwargs)
        if func is torch.ops.aten._scaled_dot_product_cudnn_attention.default:
            return self.cudnn(*args, **kwargs)
        return func(*args, **kwargs)

    def flash(
        self, q, k, v, query_ends, key_ends, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale
    ) -> tuple[torch.Tensor, ...]:
        """BSHD; bottom-right."""
        assert dropout_p == 0.0 and not return_debug_mask
        if query_ends is None:
            assert key_ends is None and (max_q, max_k) == (q.shape[1], k.shape[1])
            output, lse = self.package.dense(q, k, v, scale, is_causal)
        else:
            output, lse = self.package.packed(q, k, v, (query_ends, key_ends, max_q, max_k), scale, is_causal)
        nothing = torch.empty(0, dtype=q.dtype)
        return output, lse, torch.empty(2, dtype=torch.int64), torch.empty(()), nothing

    def efficient(
        self, q, k, v, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale
    ) -> tuple[torch.Tensor, ...]:
        """BHSD, as many KV heads as heads; causality top-left; rows of the log-sum-exp rounded up to 32."""
        self.package.num_runs += 1
        assert compute_log_sumexp and dropout_p == 0.0 and q.shape[1] == k.shape[1] == v.shape[1]
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

    def cudnn(
        self, q, k, v, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale
    ) -> tuple[torch.Tensor, ...]:
        """BHSD, laid out as the query; log-sum-exps with a last dimension of 1, as cuDNN leaves some of them."""
        assert bias is None and compute_log_sumexp and dropout_p == 0.0 and is_causal and not return_debug_mask
        assert q.shape[2] == k.shape[2], "cuDNN aligns causality top-left"
        self.package.num_runs += 1
        pairs = zip(*(tensor.transpose(1, 2) for tensor in (q, k, v)), strict=True)
        outputs, lses = zip(*(self.package.attend(*tensors, scale, 0.0) for tensors in pairs), strict=True)
        lse = torch.stack([lse.T.contiguous().T for lse in lses])[..., None]
        return torch.stack(outputs).transpose(1, 2), lse, None, None, q.shape[2], k.shape[2], None, None, None


@pytest.mark.parametrize("value_dim", [16, 8])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("passes_mask", [True, False], ids=["mask", "no_mask"])
@pytest.mark.parametrize("kind", ["flash", "efficient"])
def test_torch_on_cuda(kind: str, passes_mask: bool, padding: str, rows: int, value_dim: int) -> None:
    call = make_call(torch.float32, padding, rows, value_dim=value_dim)
    attention = Attention(**call, mask=model_mask(call) if passes_mask else None)
    with PlayedOps() as ops:
        found = flash_attention(TORCH_FLASH, attention) if kind == "flash" else efficient_attention(attention)
    check(found, call)
    assert ops.package.num_runs == 1


@pytest.mark.parametrize("value_dim", [16, 8])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_cudnn(kv_heads: int, value_dim: int) -> None:
    call = make_call(torch.float32, "none", KEYS, kv_heads=kv_heads, value_dim=value_dim)
    with PlayedOps() as ops:
        output, lse = cudnn_attention(Attention(**call))
    check((output, lse), call)
    assert lse.is_contiguous() and ops.package.num_runs == 1


@pytest.mark.parametrize(
    "results",
    [
        lambda output, lse: output,
        lambda output, lse: (output, None),
        lambda output, lse: (output, lse.bfloat16()),
        lambda output, lse: (output, lse.transpose(1, 2)),
        lambda output, lse: (output.transpose(1, 2), lse),
        lambda output, lse: (output, lse, lse),
    ],
    ids=["output", "no_lse", "dtype", "lse_shape", "output_shape", "two"],
)
def test_results_of_another_kind_are_refused(results: Callable) -> None:
    package = Package()
    kernel = FlashKernel(
        "odd_package",
        lambda q, k, v, packing, scaling, softcap: results(*package.dense(q, k, v, scaling, True)),
        has_softcap=False,
        has_packing=False,
    )
    call = make_call(torch.float32, "none", 9)
    with pytest.raises(RuntimeError, match="odd_package was expected to return"):
        flash_attention(kernel, Attention(**call))


# Which provider takes what.


@pytest.mark.parametrize(
    ("implementation", "changes"),
    [
        ("sdpa", {"dtype": torch.float64}),
        ("sdpa", {"value_dim": 8}),
        ("sdpa", {"softcap": 30.0}),
        ("sdpa", {"mask": torch.zeros(1, 1, KEYS, KEYS)}),
        ("sdpa", {"needs_grad": True}),
        ("sdpa", {"autocast": torch.bfloat16}),
        ("eager", {}),
        ("paged|sdpa", {}),
        ("flex_attention", {}),
        ("flash_attention_2", {}),  # on the CPU
    ],
    ids=str,
)
def test_no_provider_on_the_cpu(implementation: str, changes: dict[str, Any]) -> None:
    call = make_call(changes.get("dtype", torch.float32), "none", KEYS, value_dim=changes.get("value_dim", 16))
    call |= {name: changes[name] for name in ("mask", "softcap") if name in changes}
    call["query"].requires_grad_(changes.get("needs_grad", False))
    with torch.autocast("cpu", dtype=changes.get("autocast"), enabled="autocast" in changes):
        assert attention_with_lse(implementation, **call) is None


def test_backends_that_the_user_turned_off_are_not_used() -> None:
    call = make_call(torch.float32, "none", KEYS)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert attention_with_lse("sdpa", **call) is None
    assert attention_with_lse("sdpa", **call) is not None


@pytest.fixture
def fake_device(without_packages: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Tensors without storage on a CUDA device that is thought to run torch's flash kernels."""
    without_packages.setattr(lse_module, "_has_torch_flash", lambda device: True)
    without_packages.setattr(torch.backends.cudnn, "is_available", lambda: False)
    with FakeTensorMode():
        yield without_packages


@pytest.fixture
def fake_cudnn(fake_device: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A device for which torch chooses cuDNN; what it was asked about."""
    asked: list[dict[str, Any]] = []

    def choose(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **settings: Any) -> int:
        asked.append(settings)
        return SDPBackend.CUDNN_ATTENTION.value

    fake_device.setattr(torch.backends.cudnn, "is_available", lambda: True)
    fake_device.setattr(torch, "_fused_sdp_choice", choose)
    return asked


def as_fake(call: dict[str, Any], device: str) -> dict[str, Any]:
    """The same call with fake tensors on a device."""
    return {
        name: torch.empty(value.shape, dtype=value.dtype, device=device) if isinstance(value, torch.Tensor) else value
        for name, value in call.items()
    }


# Builds of torch without CUDA refuse to index even fake tensors on it.
FAKE_DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(torch.version.cuda is None, reason="built without")),
]
FAKE_CALLS = {
    f"{padding}-{dtype}-{value_dim}": (padding, dtype, value_dim)
    for padding in ("none", "gaps")
    for dtype, value_dim in ((torch.bfloat16, 16), (torch.float16, 16), (torch.float32, 16), (torch.bfloat16, 8))
}


@pytest.mark.parametrize(
    ("implementation", "package", "dtype", "changes", "is_given"),
    [
        ("sdpa", None, torch.bfloat16, {}, True),
        ("sdpa", None, torch.float32, {}, True),
        ("sdpa", None, torch.float64, {}, False),
        ("sdpa", None, torch.bfloat16, {"softcap": 30.0}, False),
        ("sdpa", None, torch.bfloat16, {"head_dim": 20}, False),
        ("sdpa", None, torch.bfloat16, {"head_dim": 264}, False),
        ("flash_attention_2", None, torch.bfloat16, {}, True),
        ("flash_attention_2", None, torch.float32, {}, False),
        ("flash_attention_2", None, torch.bfloat16, {"softcap": 30.0}, False),
        ("flash_attention_2", "fa2", torch.bfloat16, {"softcap": 30.0}, True),
        ("flash_attention_2", "fa2", torch.bfloat16, {"head_dim": 20}, True),
        ("flash_attention_2", "fa2", torch.bfloat16, {"value_dim": 24}, False),
        ("kernels-community/flash-attn2", None, torch.float16, {}, True),
        ("kernels-community/flash-attn2@v1", None, torch.float16, {}, True),
        ("flash_attention_3", None, torch.bfloat16, {}, False),
        ("flash_attention_3", "early_fa3", torch.bfloat16, {"softcap": 30.0}, False),
        ("flash_attention_3", "fa3_fwd", torch.bfloat16, {}, True),
        ("flash_attention_3", "fa3_fwd", torch.float16, {}, False),
        ("flash_attention_4", None, torch.bfloat16, {}, False),
        ("flash_attention_4", "fa4", torch.bfloat16, {}, True),
        ("flash_attention_2", "fa4", torch.bfloat16, {}, True),  # torch's own
        ("flash_attention_2", "fa4", torch.bfloat16, {"softcap": 30.0}, False),
        ("paged|flash_attention_2", "fa2", torch.bfloat16, {}, False),
        ("someone/flash-attn2", "fa2", torch.bfloat16, {}, False),
        ("eager", "fa2", torch.bfloat16, {}, False),
    ],
)  # fmt: skip
def test_choice_on_cuda(
    fake_device: pytest.MonkeyPatch,
    implementation: str,
    package: str | None,
    dtype: torch.dtype,
    changes: dict[str, Any],
    is_given: bool,
) -> None:
    if package is not None:
        install_package(fake_device, package)
    head_dim = changes.get("head_dim", 16)
    query, key = (torch.empty(2, heads, KEYS, head_dim, dtype=dtype, device="cuda") for heads in (6, 2))
    value = torch.empty(2, 2, KEYS, changes.get("value_dim", head_dim), dtype=dtype, device="cuda")
    assert can_give_lse(implementation, query, key, value, softcap=changes.get("softcap")) == is_given


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("padding", "dtype", "value_dim"), FAKE_CALLS.values(), ids=FAKE_CALLS)
@pytest.mark.parametrize("device", FAKE_DEVICES)
def test_torch_on_cuda_asks_nothing_of_the_device(
    fake_device: pytest.MonkeyPatch, device: str, padding: str, dtype: torch.dtype, value_dim: int, rows: int
) -> None:
    """Fake tensors have no values: whatever waited for one would raise."""
    call = as_fake(make_call(dtype, "none", rows, value_dim=value_dim), device)
    if padding != "none":
        call |= {"key_mask": torch.empty(3, KEYS, dtype=torch.bool, device=device), "row_present": [27, 36, 33]}

    def attend() -> tuple[torch.Tensor, torch.Tensor] | None:
        if device == "cuda":
            return attention_with_lse("sdpa", **call)
        # What the choice gives on CUDA takes tensors of any device.
        if dtype == torch.float32:
            return efficient_attention(Attention(**call))
        return flash_attention(TORCH_FLASH, Attention(**call))

    with CountedOps() as ops:
        output, lse = attend()
    assert output.shape == (3, rows, 6, value_dim) and output.dtype == dtype and output.is_contiguous()
    assert lse.shape == (3, 6, rows) and lse.dtype == torch.float32 and lse.is_contiguous()
    kernel = "_scaled_dot_product_efficient_attention" if dtype == torch.float32 else "_flash_attention_forward"
    assert ops.attentions() == {kernel: 1} and lse.device.type == output.device.type == device
    if padding != "none" and dtype != torch.float32:
        del call["row_present"]
        with pytest.raises(DataDependentOutputException):
            attend()


def provider_of(call: dict[str, Any], implementation: str = "sdpa") -> Callable | None:
    """The function that computes a call."""
    tensors = (call[name] for name in ("query", "key", "value"))
    return lse_module._choose(implementation, *tensors, call.get("mask"), call.get("key_mask"), None)


@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cudnn_where_torch_chooses_it(fake_cudnn: list[dict[str, Any]], dtype: torch.dtype, kv_heads: int) -> None:
    assert provider_of(as_fake(make_call(dtype, "none", KEYS, kv_heads=kv_heads), "cuda")) is cudnn_attention
    assert fake_cudnn == [{"is_causal": True, "enable_gqa": kv_heads != 6}]


@pytest.mark.parametrize("device", FAKE_DEVICES)
def test_cudnn_gives_log_sum_exps_of_the_usual_shape(fake_cudnn: list[dict[str, Any]], device: str) -> None:
    call = as_fake(make_call(torch.bfloat16, "none", KEYS), device)
    with CountedOps() as ops:
        output, lse = cudnn_attention(Attention(**call))
    assert ops.attentions() == {"_scaled_dot_product_cudnn_attention": 1}
    assert output.shape == (3, KEYS, 6, 16) and output.dtype == torch.bfloat16 and output.is_contiguous()
    assert lse.shape == (3, 6, KEYS) and lse.dtype == torch.float32 and lse.is_contiguous()


@pytest.mark.parametrize(
    ("implementation", "dtype", "rows", "changes"),
    [
        ("sdpa", torch.bfloat16, 9, {}),  # causal from the bottom right
        ("sdpa", torch.bfloat16, KEYS, {"key_mask": (3, KEYS)}),
        ("sdpa", torch.bfloat16, KEYS, {"mask": (1, 1, KEYS, KEYS)}),
        ("sdpa", torch.float32, KEYS, {}),
        ("flash_attention_2", torch.bfloat16, KEYS, {}),
    ],
)
def test_cudnn_is_not_asked_for_what_it_cannot_do(
    fake_cudnn: list[dict[str, Any]],
    implementation: str,
    dtype: torch.dtype,
    rows: int,
    changes: dict[str, tuple[int, ...]],
) -> None:
    call = as_fake(make_call(dtype, "none", rows), "cuda")
    masks = {name: torch.empty(shape, dtype=torch.bool, device="cuda") for name, shape in changes.items()}
    assert provider_of(call | masks, implementation) not in (None, cudnn_attention)
    assert fake_cudnn == []


@pytest.mark.parametrize("choice", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_other_choices_than_cudnn(
    fake_cudnn: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, choice: SDPBackend
) -> None:
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *tensors, **settings: choice.value)
    provider = provider_of(as_fake(make_call(torch.bfloat16, "none", KEYS), "cuda"))
    assert provider.func is flash_attention and provider.args == (TORCH_FLASH,)


@pytest.mark.parametrize("keys", [KEYS, 48])
def test_bias_of_the_efficient_kernel_is_aligned(keys: int) -> None:
    allowed = torch.ones(9, keys, dtype=torch.bool).tril(keys - 9).expand(3, 1, 9, keys)
    bias = lse_module._additive_bias(allowed, torch.empty(3, 6, 9, 16))
    assert torch.equal(bias.exp(), allowed.expand(3, 6, 9, keys).float())
    assert all(stride % 16 == 0 for stride in bias.stride()[:3]) and bias.stride(1) == 0


# The schemas that the adapter calls by position.


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (
            "_flash_attention_forward",
            "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask scale",
        ),
        (
            "_scaled_dot_product_efficient_attention",
            "query key value attn_bias compute_log_sumexp dropout_p is_causal scale",
        ),
        (
            "_scaled_dot_product_cudnn_attention",
            "query key value attn_bias compute_log_sumexp dropout_p is_causal return_debug_mask scale",
        ),
        ("_fused_sdp_choice", "query key value attn_mask dropout_p is_causal scale enable_gqa"),
    ],
)
def test_schemas_of_torch(name: str, arguments: str) -> None:
    schema = getattr(torch.ops.aten, name).default._schema
    names = [argument.name for argument in schema.arguments]
    wanted = arguments.split()
    assert names[: len(wanted)] == wanted
    assert all(argument.has_default_value() for argument in schema.arguments[len(wanted) :])


# On a GPU.


IMPLEMENTATIONS = ["sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4"]


@pytest.mark.cuda
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_on_cuda(implementation: str, dtype: torch.dtype, padding: str, rows: int) -> None:
    call = make_call(dtype, padding, rows, device="cuda")
    if not can_give_lse(implementation, call["query"], call["key"], call["value"], key_mask=call.get("key_mask")):
        assert implementation != "sdpa" and (implementation != "flash_attention_2" or dtype == torch.float32)
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


@pytest.mark.cuda
@pytest.mark.parametrize("padding", ["none", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_cuda_as_sdpa(dtype: torch.dtype, padding: str) -> None:
    """What the model's own attention function gives for tokens, with the mask it would be passed."""
    call = make_call(dtype, padding, KEYS, device="cuda")
    mask = None if padding == "none" else model_mask(call).cuda()
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    wanted, _ = sdpa_attention_forward(
        module, call["query"], call["key"], call["value"], mask, scaling=call["scaling"]
    )
    output, _ = attention_with_lse("sdpa", **call, mask=mask)
    is_token = call.get("key_mask", torch.ones(3, KEYS, dtype=torch.bool, device="cuda"))
    tolerance = max(TOLERANCES[dtype][0], CUDA_TOLERANCE)
    torch.testing.assert_close(output[is_token], wanted[is_token], atol=tolerance, rtol=tolerance)


@pytest.mark.cuda
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("rows", [1500, 64])
def test_long_prompts_on_cuda(rows: int, head_dim: int) -> None:
    """Lengths over many blocks of the kernels, padded on the left."""
    call = {
        "query": torch.randn(2, 8, rows, head_dim, device="cuda", dtype=torch.bfloat16),
        "key": torch.randn(2, 2, 1500, head_dim, device="cuda", dtype=torch.bfloat16),
        "value": torch.randn(2, 2, 1500, head_dim, device="cuda", dtype=torch.bfloat16),
        "scaling": head_dim**-0.5,
        "key_mask": torch.arange(1500, device="cuda") >= torch.tensor([[700], [0]], device="cuda"),
        "row_present": [800, 1500],
    }
    output, lse = attention_with_lse("sdpa", **call)
    query, key = call["query"].double(), call["key"].double().repeat_interleave(4, dim=1)
    logits = query @ key.transpose(2, 3) * call["scaling"]
    allowed = (
        torch.ones(rows, 1500, dtype=torch.bool, device="cuda").tril(1500 - rows) & call["key_mask"][:, None, None]
    )
    logits = logits.masked_fill(~allowed, -math.inf)
    wanted = (logits.softmax(dim=-1) @ call["value"].double().repeat_interleave(4, dim=1)).transpose(1, 2)
    torch.testing.assert_close(lse.double(), logits.logsumexp(dim=-1), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(output.double(), wanted.nan_to_num(0.0), atol=2e-2, rtol=2e-2)


@pytest.mark.cuda
@pytest.mark.parametrize("length", [1500, 1536, 129])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cudnn_on_cuda(dtype: torch.dtype, kv_heads: int, head_dim: int, length: int) -> None:
    """What torch itself runs on an H100, and the same output as without the log-sum-exps."""
    query = torch.randn(2, length, 8, head_dim, device="cuda", dtype=dtype).transpose(1, 2)
    key, value = (torch.randn(2, kv_heads, length, head_dim, device="cuda", dtype=dtype) for _ in range(2))
    if not lse_module._is_cudnn_chosen(query, key, value):
        pytest.skip("torch does not choose cuDNN on this machine")
    with CountedOps() as ops:
        output, lse = attention_with_lse("sdpa", query, key, value, scaling=head_dim**-0.5)
    assert ops.attentions() == {"_scaled_dot_product_cudnn_attention": 1}
    module = SimpleNamespace(num_key_value_groups=8 // kv_heads, is_causal=True)
    own, _ = sdpa_attention_forward(module, query, key, value, None, scaling=head_dim**-0.5)
    group = 8 // kv_heads
    logits = query.double() @ key.double().repeat_interleave(group, dim=1).transpose(2, 3) * head_dim**-0.5
    future = torch.ones(length, length, dtype=torch.bool, device="cuda").triu(1)
    logits = logits.masked_fill(future, -math.inf)
    wanted = (logits.softmax(dim=-1) @ value.double().repeat_interleave(group, dim=1)).transpose(1, 2)
    tolerance = TOLERANCES[dtype][0]
    torch.testing.assert_close(lse.double(), logits.logsumexp(dim=-1), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(output.double(), wanted, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(output, own, atol=tolerance, rtol=tolerance)


@pytest.mark.cuda
@pytest.mark.parametrize("rows", ROWS)
def test_efficient_kernel_in_half_precision_on_cuda(rows: int) -> None:
    call = make_call(torch.bfloat16, "gaps", rows, device="cuda")
    check(efficient_attention(Attention(**call)), call)


@pytest.mark.parametrize(
    ("change", "message"),
    [
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
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    """The kernels would read beyond the end of the tensors."""
    states = {"query": torch.zeros(2, 6, 5, 16), "key": torch.zeros(2, 2, 9, 16), "value": torch.zeros(2, 2, 9, 16)}
    with pytest.raises(ValueError, match=message):
        attention_with_lse("sdpa", **(states | change), scaling=1.0)
