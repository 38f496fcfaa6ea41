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
from pyramid_cache.ops.lse import TORCH_FLASH, Attention, attention_with_lse, flash_attention


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
# The op that each of torch's kernels for CUDA is, and what calls it.
TORCH_KERNELS: dict[str, Callable] = {
    "_flash_attention_forward": functools.partial(flash_attention, TORCH_FLASH),
    "_scaled_dot_product_efficient_attention": lse_module.efficient_attention,
    "_scaled_dot_product_cudnn_attention": lse_module.cudnn_attention,
}
FLASH, EFFICIENT, CUDNN = TORCH_KERNELS


def make_call(dtype: torch.dtype, padding: str, rows: int, device: str = "cpu", **sizes: int) -> dict[str, Any]:
    """Arguments of `attention_with_lse`: three rows, 6 heads, strided as models leave them."""
    kv_heads, head_dim = sizes.get("kv_heads", 2), sizes.get("head_dim", 16)
    query, key, value = (
        torch.randn(3, length, heads, dim, device=device).to(dtype).transpose(1, 2)
        for length, heads, dim in (
            (rows, 6, head_dim),
            (KEYS, kv_heads, head_dim),
            (KEYS, kv_heads, sizes.get("value_dim", head_dim)),
        )
    )
    call = {"query": query, "key": key, "value": value, "scaling": 0.31}
    if padding != "none":
        is_token = [[column not in columns for column in range(KEYS)] for columns in PADDINGS[padding]]
        call |= {"key_mask": torch.tensor(is_token, device=device), "row_present": [*map(sum, is_token)]}
    return call


def model_mask(call: dict[str, Any]) -> torch.Tensor:
    """`(batch, 1, rows, keys)` bool as a model passes it to sdpa."""
    query, key = call["query"], call["key"]
    mask = exact.causal(query.shape[2], key.shape[2], call.get("key_mask"), query.device)
    return mask.expand(query.shape[0], -1, -1, -1)


def check(
    found: tuple | None, call: dict, softcap: float | None = None, *, zero_padding: bool = True, lse_rtol: float = 0.0
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


class AttentionOps(TorchDispatchMode):
    """Notes the names of the attention ops that run, and answers some of all ops in torch's place."""

    def __init__(self, played: dict[Any, Callable] | None = None) -> None:
        super().__init__()
        self.names: list[str] = []
        self.played = played or {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names += [func.overloadpacket.__name__] if "attention" in func.overloadpacket.__name__ else []
        return self.played.get(func, func)(*args, **(kwargs or {}))


# On the CPU.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sdpa_on_the_cpu(dtype: torch.dtype) -> None:
    """One kernel, right in float64, and bit for bit the output of transformers with the same mask."""
    for index, (padding, rows, kv_heads) in enumerate(product(PADDINGS, [*ROWS, 2], [6, 2])):
        call = make_call(dtype, padding, rows, kv_heads=kv_heads)
        mask = model_mask(call) if index % 3 else None
        with AttentionOps() as ops:
            found = attention_with_lse("sdpa", **call, mask=mask)
        check(found, call, zero_padding=False)
        assert ops.names == ["_scaled_dot_product_flash_attention_for_cpu"]
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
    output, lse = attention_with_lse("sdpa", **call, mask=mask)
    assert (lse[1, :, 2] == -math.inf).all() and (output[1, 2] == 0).all()
    assert lse.isfinite().sum() == 6 * 14


# Flash-attention packages, played by modules with their signatures, layouts and tuples.


def attend(q, k, v, scale: float, softcap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch `(batch, tokens, heads, dim)`; output likewise, and `(batch, heads, tokens)`."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    probabilities, lse = exact.attention(q, k, scale, exact.causal(q.shape[2], k.shape[2]), softcap or None)
    return exact.output_of(probabilities, v).to(q.dtype), lse.float()


def attend_as_flash(q, k, v, ends: tuple | None, scale: float, causal: bool, softcap: float = 0.0) -> tuple:
    """
    Eager attention in float32 with the layouts and conditions of flash-attention: of a batch `(batch, tokens, heads,
    dim)`, and with the ends of its rows, of packed tokens `(total, heads, dim)`.
    """
    assert causal and q.shape[-1] == k.shape[-1] == v.shape[-1] and k.stride(-1) == v.stride(-1) == 1
    if ends is None:
        return attend(q, k, v, scale, softcap)
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
        states = q[None, queries], k[None, keys], v[None, keys]
        output[None, queries], lse[None, :, queries] = attend(*states, scale, softcap)
    return output, lse


FA3 = "softmax_scale causal qv q_descale k_descale v_descale window_size attention_chunk softcap num_splits pack_gqa"
# Names in transformers and in Python, and the arguments of `flash_attn_func`: those of packed rows come at the |.
PACKAGES: dict[str, tuple[str, str, str]] = {
    "fa2": (
        "flash_attention_2", "flash_attn",
        "q k v | dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs",
    ),
    "fa3": (
        "kernels-community/vllm-flash-attn3@v1", "flash_attn_interface",
        f"q k v | {FA3} deterministic sm_margin return_attn_probs",
    ),
    # The beta of flash-attn 3: the log-sum-exp comes without being asked for, and there is no softcap.
    "early_fa3": ("flash_attention_3", "flash_attn_interface", "q k v | softmax_scale causal deterministic"),
    "fa4": (
        "flash_attention_4", "flash_attn.cute",
        "q k v qv | gather_kv_indices softmax_scale causal window_size learnable_sink softcap num_splits pack_gqa "
        "deterministic score_mod mask_mod return_lse",
    ),
}  # fmt: skip


def function_of(name: str, is_packed: bool) -> Callable:
    """A function of a package, with its signature. It returns a log-sum-exp if asked, or if it cannot be asked."""
    ends = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"] if is_packed else []
    kind, required = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    names = PACKAGES[name][2].replace("|", " ".join(ends)).split()
    signature = inspect.Signature(
        [inspect.Parameter(each, kind, default=None if i > 2 else required) for i, each in enumerate(names)]
    )
    asks = {"return_attn_probs", "return_lse"}.intersection(names)

    def function(*arguments: Any, **named: Any) -> Any:
        given = signature.bind(*arguments, **named).arguments
        packing = tuple(given[each] for each in ends) or None
        settings = given["softmax_scale"], given["causal"], given.get("softcap", 0.0)
        output, lse = attend_as_flash(*(given[each] for each in "qkv"), packing, *settings)
        # The third of flash-attn 2 is empty without dropout; flash-attn 4 has always two, of which one may be None.
        third = [torch.empty(0, dtype=output.dtype) if is_packed else None] if name == "fa2" else []
        return output, lse if all(given.get(each) for each in asks) else None, *third

    function.__signature__ = signature
    return function


@pytest.fixture
def without_packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No flash-attention package can be imported, and none was looked for."""
    monkeypatch.setattr(lse_module, "_probed", {})
    for module in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, module, None)
    yield monkeypatch


def install_package(monkeypatch: pytest.MonkeyPatch, name: str) -> lse_module.FlashKernel:
    """Makes a package importable, and gives the kernel that the adapter finds for its implementation."""
    implementation, path, _ = PACKAGES[name]
    module = ModuleType(path)
    module.flash_attn_func, module.flash_attn_varlen_func = (function_of(name, is_packed) for is_packed in (0, 1))
    monkeypatch.setitem(sys.modules, path, module)
    if "." in path:  # flash-attn 4 comes in a `flash_attn` that holds nothing else
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    kernel = lse_module.flash_kernel(implementation)
    assert kernel is not None and kernel.name == path
    return kernel


@pytest.mark.parametrize("name", PACKAGES)
def test_packages(without_packages: pytest.MonkeyPatch, name: str) -> None:
    kernel = install_package(without_packages, name)
    for padding, rows in product(PADDINGS, ROWS):
        call = make_call(F32, padding, rows)
        check(flash_attention(kernel, Attention(**call)), call)
    assert kernel.has_softcap == (name in ("fa2", "fa3", "fa4"))
    for padding, dtype, rows in (("none", BF16, KEYS), ("gaps", BF16, 9), ("none", F16, 9), ("gaps", F16, KEYS)):
        # Narrow values, counts that only the device knows, and keys in a layout that no kernel reads.
        call = make_call(dtype, padding, rows, value_dim=5)
        call.pop("row_present", None)
        call["key"] = call["key"].transpose(2, 3).contiguous().transpose(2, 3)
        softcap = 1.5 if kernel.has_softcap else None
        check(flash_attention(kernel, Attention(**call, softcap=softcap)), call, softcap)
    # Full rows are not packed.
    call = make_call(F32, "none", 9) | {"key_mask": torch.ones(3, KEYS, dtype=torch.bool), "row_present": [KEYS] * 3}
    assert lse_module._pack(Attention(**call)) is None


def test_results_of_another_kind_are_refused() -> None:
    output, lse = torch.zeros(3, 9, 6, 16), torch.zeros(3, 6, 9)
    for results in (output, (output, None), (output, lse.bfloat16()), (output, lse.transpose(1, 2)), (lse, output)):
        with pytest.raises(RuntimeError, match="odd_package was expected to return"):
            lse_module._checked("odd_package", results, lse.shape)


# Torch's kernels for CUDA, played by a mode that answers the calls of their ops.


class PlayedOps(AttentionOps):
    """Eager attention with the layouts of torch's ops, on the CPU."""

    def __init__(self) -> None:
        played = zip(TORCH_KERNELS, (self.flash, self.efficient, self.cudnn), strict=True)
        super().__init__({getattr(torch.ops.aten, name).default: function for name, function in played})

    def flash(self, q, k, v, query_ends, key_ends, max_q, max_k, dropout_p, is_causal, debug, *, scale) -> tuple:
        """BSHD; bottom-right."""
        assert dropout_p == 0.0 and not debug
        ends = None if query_ends is None else (query_ends, key_ends, max_q, max_k)
        assert ends is not None or (key_ends, max_q, max_k) == (None, q.shape[1], k.shape[1])
        output, lse = attend_as_flash(q, k, v, ends, scale, is_causal)
        return output, lse, torch.empty(2, dtype=torch.int64), torch.empty(()), torch.empty(0, dtype=q.dtype)

    def efficient(self, q, k, v, bias, gives_lse, dropout_p=0.0, is_causal=False, *, scale) -> tuple:
        """BHSD, as many KV heads as heads; causality top-left; rows of the log-sum-exp rounded up to 32."""
        assert gives_lse and dropout_p == 0.0 and q.shape[1] == k.shape[1] == v.shape[1]
        logits = q.float() @ k.float().transpose(2, 3) * scale
        if bias is not None:
            assert bias.shape == logits.shape and bias.dtype == q.dtype
            # Rows begin at multiples of 128 bits; no head has a copy of its own.
            assert all(stride % 16 == 0 for stride in bias.stride()[:3]) and bias.stride(1) == 0
            logits = logits + bias.float()
        if is_causal:
            logits = logits.masked_fill(torch.ones(logits.shape[2:], dtype=torch.bool).triu(1), -math.inf)
        output = (logits.softmax(dim=-1) @ v.float()).to(q.dtype)
        lse = torch.full((*q.shape[:2], -(-q.shape[2] // 32) * 32), math.inf)
        lse[:, :, : q.shape[2]] = logits.logsumexp(dim=-1)
        return output.transpose(1, 2).contiguous().transpose(1, 2), lse, torch.empty(()), torch.empty(())

    def cudnn(self, q, k, v, bias, gives_lse, dropout_p=0.0, is_causal=False, debug=False, *, scale) -> tuple:
        """BHSD, laid out as the query; log-sum-exps with a last dimension of 1, as cuDNN leaves some of them."""
        assert bias is None and gives_lse and dropout_p == 0.0 and not debug
        assert q.shape[2] == k.shape[2], "cuDNN aligns causality top-left"
        output, lse = attend_as_flash(*(tensor.transpose(1, 2) for tensor in (q, k, v)), None, scale, is_causal)
        lse = lse.mT.contiguous().mT[..., None]
        return output.transpose(1, 2), lse, None, None, q.shape[2], k.shape[2], None, None, None


@pytest.mark.parametrize("kernel", TORCH_KERNELS)
def test_kernels_of_torch(kernel: str) -> None:
    cases = [("none", KEYS)] if kernel == CUDNN else list(product(PADDINGS, ROWS))
    for (padding, rows), kv_heads in product(cases, [6, 2]):
        # Values as wide as keys and, but for cuDNN, narrower, with the mask and without it.
        value_dim = 16 if kv_heads == 6 or kernel == CUDNN else 8
        call = make_call(F32, padding, rows, value_dim=value_dim, kv_heads=kv_heads)
        has_mask = kernel != CUDNN and (rows + kv_heads) % 3 != 0
        with PlayedOps() as ops:
            found = TORCH_KERNELS[kernel](Attention(**call, mask=model_mask(call) if has_mask else None))
        check(found, call)
        assert found[1].is_contiguous() and ops.names == [kernel]


# Which provider takes what.


def test_no_provider_on_the_cpu() -> None:
    call = make_call(F32, "none", KEYS)
    for implementation, changes in (
        ("sdpa", make_call(torch.float64, "none", KEYS)),
        ("sdpa", make_call(F32, "none", KEYS, value_dim=8)),
        ("sdpa", {"softcap": 30.0}),
        ("sdpa", {"mask": torch.zeros(1, 1, KEYS, KEYS)}),
        ("sdpa", {"query": call["query"].clone().requires_grad_()}),
        ("paged|sdpa", {}),
        ("flash_attention_2", {}),  # on the CPU
    ):
        assert attention_with_lse(implementation, **(call | changes)) is None, (implementation, changes)
    for context in (torch.autocast("cpu", dtype=BF16), torch.nn.attention.sdpa_kernel(SDPBackend.MATH)):
        with context:  # the user has another dtype, or turned the other kernels off
            assert attention_with_lse("sdpa", **call) is None
    assert attention_with_lse("sdpa", **call) is not None


@pytest.fixture
def fake_device(without_packages: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Tensors without storage on a CUDA device that is thought to run torch's flash kernels."""
    without_packages.setattr(lse_module, "_has_torch_flash", lambda device: True)
    without_packages.setattr(torch.backends.cudnn, "is_available", lambda: False)
    with FakeTensorMode():
        yield without_packages


# Builds of torch without CUDA refuse to index even fake tensors on it.
FAKE_DEVICES = ["cpu"] if torch.version.cuda is None else ["cpu", "cuda"]
CHOICES = [
    ("sdpa", None, torch.float64, None, {}, False),
    ("sdpa", None, BF16, None, {"head_dim": 20}, False),
    ("sdpa", None, BF16, None, {"head_dim": 264}, False),
    ("flash_attention_2", None, F32, None, {}, False),
    ("flash_attention_2", None, BF16, 30.0, {}, False),
    ("flash_attention_2", "fa2", BF16, 30.0, {}, True),
    ("flash_attention_2", "fa2", BF16, None, {"head_dim": 20}, True),
    ("flash_attention_2", "fa2", BF16, None, {"value_dim": 24}, False),
    ("kernels-community/flash-attn2@v1", None, F16, None, {}, True),
    ("flash_attention_3", None, BF16, None, {}, False),
    ("flash_attention_3", "early_fa3", BF16, 30.0, {}, False),
    ("flash_attention_3", "fa3", F16, 30.0, {}, True),
    ("flash_attention_4", "fa4", BF16, None, {}, True),
    ("flash_attention_2", "fa4", BF16, None, {}, True),  # torch's own
    ("flash_attention_2", "fa4", BF16, 30.0, {}, False),
    ("paged|flash_attention_2", "fa2", BF16, None, {}, False),
    ("someone/flash-attn2", "fa2", BF16, None, {}, False),
]


def test_choice_on_cuda(fake_device: pytest.MonkeyPatch) -> None:
    for implementation, package, dtype, softcap, changes, is_given in CHOICES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lse_module, "_probed", {})
            if package is not None:
                install_package(patch, package)
            call = make_call(dtype, "none", KEYS, "cuda", **changes) | {"softcap": softcap}
            provider = lse_module._choose(implementation, Attention(**call))
            assert (provider is not None) == is_given, (implementation, package, dtype, call)


@pytest.mark.parametrize("device", FAKE_DEVICES)
def test_torch_on_cuda_asks_nothing_of_the_device(fake_device: pytest.MonkeyPatch, device: str) -> None:
    """Fake tensors have no values: whatever waited for one would raise."""
    cases = list(product(["none", "gaps"], [(BF16, 8, FLASH), (F16, 16, FLASH), (F32, 16, EFFICIENT)], ROWS))
    cases.append(("none", (BF16, 16, CUDNN), KEYS))
    for padding, (dtype, value_dim, kernel), rows in cases:
        call = make_call(dtype, padding, rows, value_dim=value_dim, device=device)
        with AttentionOps() as ops:
            if device == "cpu" or kernel == CUDNN:  # what the choice gives on CUDA takes tensors of any device
                output, lse = TORCH_KERNELS[kernel](Attention(**call))
            else:
                output, lse = attention_with_lse("sdpa", **call)
        assert output.shape == (3, rows, 6, value_dim) and output.dtype == dtype and output.is_contiguous()
        assert lse.shape == (3, 6, rows) and lse.dtype == torch.float32 and lse.is_contiguous()
        assert ops.names == [kernel] and lse.device.type == output.device.type == device
    with pytest.raises(DataDependentOutputException):
        TORCH_KERNELS[FLASH](Attention(**make_call(BF16, "gaps", 9, device=device) | {"row_present": None}))


def test_cudnn_where_torch_chooses_it(fake_device: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    answer = SDPBackend.CUDNN_ATTENTION
    fake_device.setattr(torch.backends.cudnn, "is_available", lambda: True)
    fake_device.setattr(torch, "_fused_sdp_choice", lambda *states, **given: asked.append(given) or answer.value)

    def provider_of(implementation: str, dtype: torch.dtype, rows: int, kv_heads: int = 2, **masks: tuple) -> Callable:
        call = make_call(dtype, "none", rows, "cuda", kv_heads=kv_heads)
        call |= {name: torch.empty(shape, dtype=torch.bool, device="cuda") for name, shape in masks.items()}
        return lse_module._choose(implementation, Attention(**call))

    for dtype, kv_heads in product([BF16, F16], [6, 2]):
        assert provider_of("sdpa", dtype, KEYS, kv_heads) is TORCH_KERNELS[CUDNN]
        assert asked.pop() == {"is_causal": True, "enable_gqa": kv_heads != 6}
    for implementation, dtype, rows, masks in (
        ("sdpa", BF16, 9, {}),  # causal from the bottom right
        ("sdpa", BF16, KEYS, {"key_mask": (3, KEYS)}),
        ("sdpa", BF16, KEYS, {"mask": (1, 1, KEYS, KEYS)}),
        ("sdpa", F32, KEYS, {}),
        ("flash_attention_2", BF16, KEYS, {}),
    ):
        assert provider_of(implementation, dtype, rows, **masks) not in (None, TORCH_KERNELS[CUDNN])
        assert asked == []  # cuDNN cannot do it
    answer = SDPBackend.FLASH_ATTENTION
    provider = provider_of("sdpa", BF16, KEYS)
    assert provider.func is flash_attention and provider.args == (TORCH_FLASH,)


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
        ({"query": torch.zeros(2, 5, 5, 16)}, "5 query heads cannot share 2 KV heads"),
        ({"query": torch.zeros(2, 6, 0, 16)}, "0 query rows cannot be the last ones of 9 keys"),
        ({"query": torch.zeros(2, 6, 10, 16)}, "10 query rows cannot be the last ones of 9 keys"),
        ({"value": torch.zeros(2, 2, 8, 16)}, r"`value` must have the shape \(2, 2, 9, any\)"),
        ({"mask": torch.ones(2, 1, 5, 8).bool()}, r"`mask` must have the shape \(2 or 1, 1, 5, 9\)"),
        ({"mask": torch.ones(3, 1, 5, 9).bool()}, r"`mask` must have the shape \(2 or 1, 1, 5, 9\)"),
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
        if lse_module._choose(implementation, Attention(**call)) is None:
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
            check(TORCH_KERNELS[EFFICIENT](Attention(**call)), call)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_long_prompts_on_cuda(dtype: torch.dtype) -> None:
    """Where torch itself runs cuDNN, as on an H100, the same output as without log-sum-exps; and with padding."""
    for kv_heads, head_dim, length in product([8, 2, 1], [64, 80, 128, 256], [1500, 1536, 129]):
        query = torch.randn(2, length, 8, head_dim, device="cuda", dtype=dtype).transpose(1, 2)
        key, value = (torch.randn(2, kv_heads, length, head_dim, device="cuda", dtype=dtype) for _ in range(2))
        call = {"query": query, "key": key, "value": value, "scaling": head_dim**-0.5}
        if lse_module._is_cudnn_chosen(query, key, value):
            with AttentionOps() as ops:
                found = attention_with_lse("sdpa", **call)
            assert ops.names == [CUDNN]
            check(found, call, lse_rtol=1e-5)
            tolerance = TOLERANCES[dtype][0]
            torch.testing.assert_close(found[0], output_of_transformers(call, None), atol=tolerance, rtol=tolerance)
        key_mask = torch.arange(length, device="cuda") >= torch.tensor([[length // 2], [0]], device="cuda")
        call |= {"key_mask": key_mask, "row_present": [length - length // 2, length]}
        for rows in (length, 64):
            call["query"] = query[:, :, -rows:]
            check(attention_with_lse("sdpa", **call), call, lse_rtol=1e-5)
