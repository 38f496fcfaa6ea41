"""
Attention with the log-sum-exp that it normalised by, from one run of the attention that the user chose.

Every fused attention kernel computes the log-sum-exp of each row for the backward pass, but transformers does not ask
for it. The adapter here calls the kernel behind an `attn_implementation` as transformers would, and asks. All kernels
are causal and aligned bottom-right where nothing else is said. They return the output first and the log-sum-exps next:
float32 natural logarithms with the scaling inside, `(batch, heads, rows)`, or `(heads, total rows)` for packed rows.

For torch's kernels the adapter calls private ops of `torch.ops.aten`, because no public function of torch 2.11
replaces one: `scaled_dot_product_attention` returns no log-sum-exp; `torch.nn.attention.varlen.varlen_attn` runs on
CUDA alone, for packed rows, and in torch 2.11 takes no shared KV heads (`enable_gqa`); `flex_attention(...,
return_aux=AuxRequest(lse=True))` makes the whole matrix in eager mode, cannot be compiled with log-sum-exps on the
CPU, and on CUDA is another kernel than sdpa's.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend

from pyramid_cache.ops.reference import causal_mask
from pyramid_cache.ops.registration import check_dtype, check_query, check_shape, needs_gradients


HALF_DTYPES = (torch.float16, torch.bfloat16)

# The memory-efficient kernel loads 128 bits of a bias at once and refuses rows that begin elsewhere; torch's own
# `scaled_dot_product_attention` rounds the rows of a mask up to 16 elements for it.
BIAS_STEP = 16


@dataclass(frozen=True)
class Attention:
    """The arguments of `attention_with_lse`; see there."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    mask: torch.Tensor | None = None
    key_mask: torch.Tensor | None = None
    row_present: list[int] | None = None
    softcap: float | None = None

    @property
    def is_square(self) -> bool:
        """Whether plain causality is all there is to mask, and the same at either corner."""
        return self.mask is None and self.key_mask is None and self.query.shape[2] == self.key.shape[2]

    def allowed(self) -> torch.Tensor | None:
        """The mask, made if need be: bool `(batch or 1, 1, rows, keys)`; None where every row sees every key."""
        if self.mask is not None:
            return self.mask
        rows, keys = self.query.shape[2], self.key.shape[2]
        if rows == 1 and self.key_mask is None:
            return None
        allowed = causal_mask(0, rows, rows, keys, self.key.device)[None, None]
        return allowed if self.key_mask is None else allowed & self.key_mask[:, None, None]


class Packing(NamedTuple):
    """
    How the tokens of padded rows lie behind each other in one sequence. An index `(total,)` int64 says where each of
    them comes from in the flattened `(batch, columns)`: `batch * columns` for a place that stays unused.
    """

    query_index: torch.Tensor
    key_index: torch.Tensor
    # Where the queries and the keys of each row begin and end, `(batch + 1,)` int32, and how many the longest row has.
    ends: tuple[torch.Tensor, torch.Tensor, int, int]


@dataclass(frozen=True)
class FlashKernel:
    """
    A flash-attention forward of any origin. `run` takes query, key and value, `(batch, tokens, heads, head_dim)`, or
    `(total, heads, head_dim)` with the `ends` of a `Packing`; these or None, scaling and softcap. It gives the tuple
    that the kernel returns.
    """

    name: str
    run: Callable[..., Any]
    has_softcap: bool


def attention_with_lse(
    implementation: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    row_present: list[int] | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """
    Causal attention by the kernel that the model's attention function would run, with its log-sum-exps. It is aligned
    bottom-right: row `i` sees the keys up to `keys - rows + i`. No dropout, no sliding window and no attention sinks.

    Args:
        implementation (`str`): The model's `attn_implementation`: "sdpa", "flash_attention_2", "flash_attention_3",
            "flash_attention_4", or one of the kernels of kernels-community that transformers loads in their place. For
            other names, "eager" and "paged|..." among them, there is no provider.
        query (`torch.Tensor`): `(batch, heads, rows, head_dim)`, the last `rows` queries of the sequence.
        key, value (`torch.Tensor`): `(batch, kv_heads, keys, head_dim)`, `rows <= keys`; the values may be narrower.
        scaling (`float`): Factor on the logits.
        mask (`torch.Tensor`, *optional*): bool `(batch or 1, 1, rows, keys)`, what the model passes to sdpa. It must
            agree with causality and `key_mask`: kernels that take no mask go by these.
        key_mask (`torch.Tensor`, *optional*): bool `(batch, keys)`, False for columns of padding; the queries are the
            last `rows` columns.
        row_present (`list[int]`, *optional*): The number of True columns of each row of `key_mask`. Without it,
            kernels that take packed rows wait for the device to count.
        softcap (`float`, *optional*): Logits are `softcap * tanh(logits / softcap)`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]` or None: The contiguous output `(batch, rows, heads, value_dim)` and the
        float32 log-sum-exps `(batch, heads, rows)`. Queries of padding have zeros as output (sdpa on the CPU: whatever
        the mask shows them). They and rows that attend to nothing have minus infinity as log-sum-exp. None where no
        provider computes this attention as the implementation would: then the caller runs the model's own function,
        and has `row_lse` for the log-sum-exps.

    Raises:
        ValueError: For shapes that do not fit.
        RuntimeError: A package returns something else than its documentation says.
    """
    check_query(query, key)
    check_shape("value", value, *key.shape[:3], None)
    batch, _, rows, _ = query.shape
    if not 0 < rows <= key.shape[2]:
        raise ValueError(f"{rows} query rows cannot be the last ones of {key.shape[2]} keys.")
    check_shape("mask", mask, batch, 1, rows, key.shape[2], or_one=0)
    check_shape("key_mask", key_mask, batch, key.shape[2])
    check_dtype("key_mask", key_mask, torch.bool)
    attention = Attention(query, key, value, scaling, mask, key_mask, row_present, softcap)
    provider = _choose(implementation, attention)
    return None if provider is None else provider(attention)


def _choose(
    implementation: str, attention: Attention
) -> Callable[[Attention], tuple[torch.Tensor, torch.Tensor]] | None:
    """
    The function that computes this attention. All that depends on the device is decided here. It looks at shapes,
    strides, dtypes and devices only.
    """
    query, key, value, softcap = attention.query, attention.key, attention.value, attention.softcap
    mask, key_mask = attention.mask, attention.key_mask
    if needs_gradients(query, key, value) or not query.dtype == key.dtype == value.dtype:
        return None
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    if implementation == "sdpa":
        device = query.device.type
        # Autocast would have `scaled_dot_product_attention` compute in another dtype.
        is_cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != query.dtype
        if softcap is not None or is_cast or (mask is not None and mask.dtype != torch.bool):
            return None
        if device == "cpu":
            # When torch takes the flash kernel on the CPU, as its `sdp_utils_cpp.cpp` says.
            is_dense = query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
            fits = head_dim == value_dim and is_dense and query.dtype in (torch.float32, *HALF_DTYPES)
            return cpu_attention if fits and _is_flash_enabled() else None
        if device == "cuda" and query.dtype == torch.float32:
            return efficient_attention if _is_efficient_enabled() else None
        if mask is None and key_mask is None and _is_cudnn_chosen(query, key, value):
            return cudnn_attention
        kernel = TORCH_FLASH if _is_flash_enabled() else None
    else:
        kernel = flash_kernel(implementation)
    if kernel is None or query.device.type != "cuda" or query.dtype not in HALF_DTYPES or value_dim > head_dim:
        return None
    # Torch's own flash kernels are compiled for head dims up to 256 in steps of 8.
    if kernel is TORCH_FLASH and not (head_dim % 8 == 0 and head_dim <= 256 and _has_torch_flash(query.device)):
        return None
    return None if softcap is not None and not kernel.has_softcap else functools.partial(flash_attention, kernel)


# Compilers cannot trace into these, and take what they answer at the time for good.


@torch.compiler.assume_constant_result
def _is_flash_enabled() -> bool:
    """Whether the user lets sdpa take flash kernels, which is the default."""
    return torch.backends.cuda.flash_sdp_enabled()


@torch.compiler.assume_constant_result
def _is_efficient_enabled() -> bool:
    """Whether the user lets sdpa take the memory-efficient kernel, in the version for NVIDIA's devices."""
    return torch.version.hip is None and torch.backends.cuda.mem_efficient_sdp_enabled()


def _is_cudnn_chosen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """
    Whether `scaled_dot_product_attention` runs causal attention of as many queries as keys by cuDNN, as it does on an
    H100, where that takes half the time of torch's flash kernel. Torch is asked: its answer depends on the device, the
    version of cuDNN, shapes and strides, and what the user turned off or prefers.
    """
    # Compilers cannot trace into the question, and elsewhere torch has no answer to it for tensors without contents.
    if query.shape[2] != key.shape[2] or torch.compiler.is_compiling() or not torch.backends.cudnn.is_available():
        return False
    choice = torch._fused_sdp_choice(query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1])
    return choice == SDPBackend.CUDNN_ATTENTION.value


@torch.compiler.assume_constant_result
def _has_torch_flash(device: torch.device) -> bool:
    """Whether torch was built with its flash kernels and the device runs them. ROCm has another of that name."""
    return (
        torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


# "sdpa" on the CPU.


def cpu_attention(attention: Attention) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel that `scaled_dot_product_attention` runs on the CPU, asked for its log-sum-exps, too."""
    query, key_mask = attention.query, attention.key_mask
    mask = None if attention.is_square else attention.allowed()
    # The kernel's own causality is aligned top-left, and its mask must be additive in the dtype of the query.
    is_causal, bias = mask is None and query.shape[2] > 1, None
    if mask is not None:
        bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, attention.key, attention.value, 0.0, is_causal, attn_mask=bias, scale=attention.scaling
    )
    # The kernel gives zero for a row without keys. A token sees itself: only queries of padding can be without keys,
    # so that a `key_mask` saves looking through the whole mask.
    if key_mask is not None:
        lse = _without_padding(lse, key_mask)
    elif mask is not None:
        lse = lse.masked_fill(~mask.any(dim=-1), float("-inf"))
    return output.transpose(1, 2).contiguous(), lse


def _without_padding(lse: torch.Tensor, key_mask: torch.Tensor) -> torch.Tensor:
    """Minus infinity in `(batch, heads, rows)` log-sum-exps of padding; the queries are the last `rows` columns."""
    return lse.masked_fill(~key_mask[:, None, key_mask.shape[1] - lse.shape[2] :], float("-inf"))


# "sdpa" on CUDA.


def cudnn_attention(attention: Attention) -> tuple[torch.Tensor, torch.Tensor]:
    """
    CuDNN's attention, of as many queries as keys, since its causality is aligned top-left. It takes shared KV heads,
    and its log-sum-exps, in natural logarithms with the scaling inside, have a last dimension of 1 and any strides.
    """
    output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        attention.query, attention.key, attention.value, None, True, 0.0, True, False, scale=attention.scaling
    )
    return output.transpose(1, 2).contiguous(), lse.reshape(attention.query.shape[:3]).contiguous()


def efficient_attention(attention: Attention) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Torch's memory-efficient kernel. It takes no shared KV heads, its own causality is aligned top-left (attention.cu
    passes `CustomMaskType::CausalFromTopLeft`), and it rounds the rows of its log-sum-exps up to a multiple of 32.
    """
    query, key, value = attention.query, attention.key, attention.value
    group, rows = query.shape[1] // key.shape[1], query.shape[2]
    if group > 1:
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    allowed = None if attention.is_square else attention.allowed()
    output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query,
        key,
        value,
        None if allowed is None else _additive_bias(allowed, query),
        True,
        0.0,
        allowed is None and rows > 1,
        scale=attention.scaling,
    )
    output, lse = output.transpose(1, 2), lse[:, :, :rows]
    if attention.key_mask is not None:
        lse = _without_padding(lse, attention.key_mask)
        output = output.masked_fill(~attention.key_mask[:, -rows:, None, None], 0.0)
    return output.contiguous(), lse.contiguous()


def _additive_bias(allowed: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Minus infinity where attention is not allowed: `(batch, heads, rows, keys)`, rows aligned, one for all heads."""
    batch, heads, rows, _ = query.shape
    keys = allowed.shape[-1]
    width = -(-keys // BIAS_STEP) * BIAS_STEP
    bias = query.new_zeros(allowed.shape[0], 1, rows, width)[..., :keys]
    return bias.masked_fill_(~allowed, float("-inf")).expand(batch, heads, rows, keys)


# Flash-attention.


def flash_attention(kernel: FlashKernel, attention: Attention) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_with_lse` by a flash-attention kernel, in rows without padding or packed without it."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (attention.query, attention.key, attention.value))
    batch, rows, heads, head_dim = query.shape
    value_dim = value.shape[-1]
    # One head_dim for all: transformers widens narrower values too, as those of multi-head latent attention.
    if value_dim < head_dim:
        value = torch.nn.functional.pad(value, (0, head_dim - value_dim))
    packing = _pack(attention)
    if packing is not None:
        query = _take(query, packing.query_index)
        key, value = _take(key, packing.key_index), _take(value, packing.key_index)
    # The kernels read any strides but that of the last dimension.
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    ends = None if packing is None else packing.ends
    results = kernel.run(query, key, value, ends, attention.scaling, attention.softcap)
    output, lse = _checked(kernel.name, results, (batch, heads, rows) if ends is None else (heads, query.shape[0]))
    if packing is not None:
        # Unused places of a packing go to one place more, which is left off. Padding stays zero and minus infinity.
        index, size = packing.query_index, batch * rows
        output = output.new_zeros(size + 1, heads, head_dim).index_copy_(0, index, output)[:size]
        lse = lse.new_full((heads, size + 1), float("-inf")).index_copy_(1, index, lse)[:, :size]
        output = output.view(batch, rows, heads, head_dim)
        lse = lse.reshape(heads, batch, rows).transpose(0, 1)
    return output[..., :value_dim].contiguous(), lse.contiguous()


def _pack(attention: Attention) -> Packing | None:
    """
    The packing that leaves padding out, without waiting for the device where `row_present` is given; None without
    padding. What is left is aligned at its end as before, since the queries are the last columns.
    """
    key_mask, rows, keys = attention.key_mask, attention.query.shape[2], attention.key.shape[2]
    if key_mask is None:
        return None
    present = key_mask.sum(dim=1).tolist() if attention.row_present is None else attention.row_present
    if min(present) == keys:
        return None
    query_mask = key_mask[:, keys - rows :]
    # How many of a row's tokens are queries is known on the host only if all are; else this is the most there can be.
    queries = [min(count, rows) for count in present]
    # Told of one query at most, kernels lay the heads of a group out as queries and take for granted that every row
    # has its one (`seqlenq_ngroups_swapped` in flash_api.cpp), which a row that ends in padding has not.
    ends = (_ends(query_mask), _ends(key_mask), max(2, *queries), max(present))
    return Packing(_nonzero(query_mask, sum(queries)), _nonzero(key_mask, sum(present)), ends)


def _nonzero(mask: torch.Tensor, size: int) -> torch.Tensor:
    """`(size,)` int64: where the flattened mask is True, filled up with its number of elements."""
    return torch.nonzero_static(mask.flatten(), size=size, fill_value=mask.numel()).squeeze(1)


def _ends(mask: torch.Tensor) -> torch.Tensor:
    """`(batch + 1,)` int32: zero, and the number of True columns up to the end of each row."""
    return torch.nn.functional.pad(mask.sum(dim=1).cumsum(dim=0, dtype=torch.int32), (1, 0))


def _take(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`(total, heads, head_dim)` of a `(batch, columns, heads, head_dim)` tensor with any strides, copied once."""
    batch, columns = tensor.shape[:2]
    index = index.clamp(max=batch * columns - 1)
    return tensor[index // columns, index % columns]


def _checked(name: str, results: Any, lse_shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The first two results of a kernel, if the second can be the log-sum-exps."""
    output, lse = results[:2] if isinstance(results, tuple | list) else (results, None)
    if lse is None or lse.dtype != torch.float32 or tuple(lse.shape) != lse_shape:
        found = "no such tensor" if lse is None else f"{lse.dtype} {tuple(lse.shape)}"
        raise RuntimeError(
            f"{name} was expected to return a float32 log-sum-exp of shape {lse_shape} behind its output, but "
            f"returned {found}. Use another version of it, or attn_implementation='sdpa'."
        )
    return output, lse


def _run_torch_flash(query, key, value, ends, scaling, softcap):
    ends = ends or (None, None, query.shape[1], key.shape[1])
    return torch.ops.aten._flash_attention_forward(query, key, value, *ends, 0.0, True, False, scale=scaling)


# flash-attn 2 as torch brings it along: shared KV heads, causal bottom-right (torch's own `attention/bias.py` relies
# on that). The schemas of torch 2.11 and 2.13 differ in what follows `scale` only, all of it optional.
TORCH_FLASH = FlashKernel("torch's flash attention", _run_torch_flash, has_softcap=False)


# The package behind an implementation. transformers takes kernels-community's where the package is not installed
# (`FLASH_ATTN_KERNEL_FALLBACK`). A kernel of any other name computes what only its author knows.
PACKAGES = {
    "flash_attention_2": "flash_attn",
    "kernels-community/flash-attn2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "kernels-community/flash-attn3": "flash_attn_interface",
    "kernels-community/vllm-flash-attn3": "flash_attn_interface",
    "flash_attention_4": "flash_attn.cute",
    "kernels-community/flash-attn4": "flash_attn.cute",
}

# The arguments for packed rows, and those that ask for the log-sum-exp: of flash-attn 2 and 3, and of 4.
ENDS_ARGUMENTS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
LSE_ARGUMENTS = ("return_attn_probs", "return_lse")

_probed: dict[str, FlashKernel | None] = {}


def flash_kernel(implementation: str) -> FlashKernel | None:
    """The kernel of a flash-attention implementation, with or without a revision; None if none is installed."""
    package = PACKAGES.get(implementation.split("@")[0])
    # A dict and not `functools.cache`, which compilers trace into.
    if package is not None and package not in _probed:
        _probed[package] = _probe(package)
    return None if package is None else _probed[package]


def _probe(package: str) -> FlashKernel | None:
    try:
        module = importlib.import_module(package)
    except (ImportError, OSError):  # not installed, or built for another torch or CUDA
        module = None
    # A `flash_attn` that holds nothing but flash-attn 4 has no such function.
    if module is not None and hasattr(module, "flash_attn_func"):
        return kernel_of_module(module)
    return TORCH_FLASH if package == "flash_attn" else None


def kernel_of_module(module: ModuleType) -> FlashKernel:
    """The kernel of a package with `flash_attn_func` and, for packed rows, `flash_attn_varlen_func`."""
    names = set(inspect.signature(module.flash_attn_func).parameters)

    def run(query, key, value, ends, scaling, softcap):
        function = module.flash_attn_func if ends is None else module.flash_attn_varlen_func
        arguments = {} if ends is None else dict(zip(ENDS_ARGUMENTS, ends, strict=True))
        # Early versions of flash-attn 3 return log-sum-exps without being asked, and have no softcap.
        arguments |= {name: True for name in LSE_ARGUMENTS if name in names}
        if softcap is not None:
            arguments["softcap"] = softcap
        return function(query, key, value, softmax_scale=scaling, causal=True, **arguments)

    return FlashKernel(module.__name__, run, "softcap" in names)
