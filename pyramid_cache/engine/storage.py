"""
Caches in files: what `CompressedCache.save` writes and `load` reads.

A file is in safetensors format: tensors, and a header in JSON among the metadata. The header names the cache, its
settings, the architecture it was filled by, samples of the weights, the numbers of each layer, and dtype, shape and
SHA-256 of each tensor. It carries a SHA-256 of its own, so that no flipped bit goes unnoticed. That is no signature:
whoever can write the file can make one that fits, hence every number and tensor is checked for what it means, too.
Nothing in a file is ever executed.
"""

import contextlib
import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel

from pyramid_cache.engine.fingerprint import WeightFingerprint, architecture_of, attention_modules, device_of_layer
from pyramid_cache.engine.foreign import foreign_kind, is_count, require_states
from pyramid_cache.engine.layer import CompressedLayer


if TYPE_CHECKING:
    from pyramid_cache.engine.cache import CompressedCache

CacheType = TypeVar("CacheType", bound="CompressedCache")

FORMAT = "pyramid_cache"
FORMAT_VERSION = "2"
HEADER_FIELDS = {"cache", "settings", "architecture", "weights", "layers", "tensors"}
# As safetensors abbreviates them.
DTYPE_NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
}
ANEW = "Make the cache again from its prompt, and save it."


# Saving.


def save_cache(cache: "CompressedCache", path: str | os.PathLike[str]) -> None:
    """See `CompressedCache.save`."""
    path = os.path.realpath(os.fsdecode(path))
    if os.path.isdir(path):
        raise ValueError(f"{path} is a directory. Give the name of a file in it.")
    if not os.path.isdir(os.path.dirname(path)):
        raise FileNotFoundError(f"There is no directory {os.path.dirname(path)} to save {path} in. Make it first.")
    settings = settings_of(cache)
    require_complete(cache)
    layers: list[dict[str, Any]] = []
    tensors: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(cache.layers):
        is_ours = isinstance(layer, CompressedLayer)
        numbers, layer_tensors = layer.export_state() if is_ours else foreign_kind(index, layer).export(layer)
        layers.append({"layer": type(layer).__name__, "numbers": numbers})
        tensors |= {f"layers.{index}.{name}": tensor for name, tensor in layer_tensors.items()}
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise NotImplementedError(
                f"{tensor.dtype} keys and values cannot be saved. Read the prompt again instead."
            )
        # Layers may share a tensor, which safetensors does not write.
        if tensor.untyped_storage().data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensors[name].untyped_storage().data_ptr())
    header = {
        "cache": type(cache).__name__,
        "settings": settings,
        "architecture": cache.architecture,
        "weights": {str(index): vars(weights) for index, weights in weights_of(cache).items()},
        "layers": layers,
        "tensors": {
            name: {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "sha256": digest_of(tensor)}
            for name, tensor in tensors.items()
        },
    }
    text = json.dumps(header, allow_nan=False)
    metadata = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "header": text,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    with replacing(path) as temporary_path:
        save_file(tensors, temporary_path, metadata=metadata)


def settings_of(cache: "CompressedCache") -> dict[str, Any]:
    """The settings of a cache, as JSON has them."""
    if cache.settings is None:
        raise ValueError(
            f"{type(cache).__name__} does not tell its settings, so it could not be loaded again. Derive a class "
            "whose constructor takes them by name (of a `PolicyCache`: the fields of its policy; "
            "docs/write-a-policy.md has one)."
        )
    settings = {}
    for name, value in cache.settings.items():
        if isinstance(value, Real) and not isinstance(value, bool):  # one of numpy's, or a fraction
            value = int(value) if isinstance(value, Integral) else float(value)
        if value is not None and type(value) not in (bool, int, float, str):
            raise ValueError(f"`{name}={value!r}` cannot be saved: build the cache with a number or a string.")
        settings[name] = value
    return settings


def require_complete(cache: "CompressedCache") -> None:
    """Raises ValueError unless the cache is between two forward passes, and has seen a token."""
    lengths = set()
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, CompressedLayer):
            lengths.add(foreign_kind(index, layer).num_seen(layer))
            continue
        if layer.is_recording_tokens:
            raise ValueError(
                "The cache cannot be saved while it holds tokens that may still be taken back. Settle them with "
                "`cache.crop(0)`, or take them back with `cache.crop(-n)`."
            )
        lengths.add(-1 if layer.num_pending else layer.get_seq_length())
    lengths.discard(None)
    if lengths == {0}:
        raise ValueError("The cache holds nothing that could be saved: run the model with it first.")
    if len(lengths) > 1 or -1 in lengths:
        raise ValueError(
            "The last forward pass of the cache was interrupted, so its layers have not seen the same tokens. Call "
            "`cache.reset()` and run the model again before you save it."
        )
    if cache.batch_size < 1 or not any(cache.compressed_layers[0].row_lengths):
        raise ValueError("The cache holds no row with a token that could be saved.")


def weights_of(cache: "CompressedCache") -> dict[int, WeightFingerprint]:
    """Of the attention modules of the first and the last layer that evicts, as far as they are known, by layer."""
    found = {}
    for layer in (cache.compressed_layers[0], cache.compressed_layers[-1]):
        module = None if layer._module is None else layer._module()
        weights = layer.expected_weights if module is None else WeightFingerprint.of(module)
        if weights is not None:
            found[layer.place.layer_idx] = weights
    return found


def digest_of(tensor: torch.Tensor) -> str:
    """SHA-256 of the bytes of a contiguous tensor on the CPU."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """
    A name in the directory of `path`; what is written there replaces `path` in one step, or is removed on an error.
    """
    temporary_path = f"{path}.{secrets.token_hex(8)}.tmp"
    try:
        # Made here, for the permissions that a new file gets.
        with open(temporary_path, "xb") as file:
            permissions = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        try:
            yield temporary_path
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error
        os.chmod(temporary_path, permissions)
        with open(temporary_path, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary_path, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary_path)
        raise


# Loading.


def load_cache(
    cache_class: type[CacheType],
    path: str | os.PathLike[str],
    config: PreTrainedConfig | PreTrainedModel,
    device: torch.device | str | int | None,
    changed: dict[str, Any],
) -> CacheType:
    """See `CompressedCache.load`; `changed` are settings that take the place of those in the file."""
    path = os.fsdecode(path)
    source: Any = config
    model = source if isinstance(source, PreTrainedModel) else None
    architecture = architecture_of(source if model is None else model.config)
    if device is not None:
        device = usable_device(device)
    with opened(path) as file:
        header = read_header(path, file)
        if header["cache"] != cache_class.__name__:
            raise ValueError(
                f"{path} holds a {header['cache']}, not a {cache_class.__name__}: load it with "
                f"`{header['cache']}.load`."
            )
        require_architecture(path, header["architecture"], architecture)
        cache = build_cache(path, cache_class, config, header["settings"] | changed)
        require_layers(path, header, cache)
        tensors = {name: read_tensor(path, file, name, header["tensors"][name]) for name in header["tensors"]}
    weights = read_weights(path, header, cache)
    states = []
    for index, layer in enumerate(cache.layers):
        prefix = f"layers.{index}."
        state = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        try:
            import_layer(index, layer, header["layers"][index]["numbers"], state)
        except ValueError as error:
            damaged(path, f"in layer {index}, {error}", error)
        states.append(state)
    require_agreement(path, cache)
    if model is not None:
        for index, expected in weights.items():
            module = attention_modules(model, expected.module).get(index)
            if module is None:
                continue
            try:
                expected.require_same(module)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
    for index, (layer, state) in enumerate(zip(cache.layers, states, strict=True)):
        target = device
        if device is None:
            target = torch.device("cpu") if model is None else device_of_layer(model, index)
        if target.type == "meta":
            raise ValueError(
                f"Layer {index} of the model is on the meta device. Say where the cache belongs: `device=...`."
            )
        if target.type != "cpu":
            state = {name: tensor.to(target) for name, tensor in state.items()}
            import_layer(index, layer, header["layers"][index]["numbers"], state)
        if index in weights:
            layer.expected_weights = weights[index]
    return cache


def damaged(path: str, what: str, cause: Exception | None = None) -> NoReturn:
    """Raises ValueError for a file that `save` did not leave behind."""
    raise ValueError(f"{path} is damaged, or was not written by `save`: {what}. {ANEW}") from cause


def usable_device(device: torch.device | str | int) -> torch.device:
    """A device as users write it."""
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"`device={device!r}` cannot be used: {error}") from error
    if found.type == "meta":
        raise ValueError("`device='meta'` holds no data. Give a device that does.")
    return found


@contextlib.contextmanager
def opened(path: str) -> Iterator[Any]:
    """A safetensors file; what is wrong with it while it is read becomes a ValueError."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "no regular file"
        raise ValueError(f"{path} is {kind}. Give the file that `save` wrote.")
    try:
        # Read, not mapped: a file that changes later must not change the cache.
        with safe_open(path, framework="pt", device="cpu", backend="pread") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}): it was truncated or damaged, or is something else. {ANEW}"
        ) from error


def read_header(path: str, file: Any) -> dict[str, Any]:
    """The header of an open file, its digest and types checked, and its tensors compared with those that are there."""
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is a safetensors file, but holds no cache (its format is {metadata.get('format')!r}). Give a "
            "file that `save` wrote."
        )
    if metadata.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} is of version {metadata.get('version')!r}, but this pyramid_cache reads version "
            f"{FORMAT_VERSION!r}. Use the version of pyramid_cache that wrote it."
        )
    text = metadata.get("header", "")
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get("sha256"):
        damaged(path, "its header does not have the SHA-256 that it had")
    try:
        header = json.loads(text, parse_constant=refuse_constant, parse_float=finite_float)
    except (ValueError, RecursionError) as error:
        damaged(path, f"its header is no JSON ({error})", error)
    if type(header) is not dict or header.keys() != HEADER_FIELDS:
        damaged(path, "its header does not have the fields that it should")
    for name, kind in (
        ("cache", str),
        ("settings", dict),
        ("architecture", dict),
        ("weights", dict),
        ("layers", list),
    ):
        if type(header[name]) is not kind:
            damaged(path, f"`{name}` in its header is {header[name]!r}")
    tensors = header["tensors"]
    if type(tensors) is not dict or tensors.keys() != set(file.keys()):
        damaged(path, "it does not hold the tensors that its header names")
    for name, expected in tensors.items():
        part = file.get_slice(name)
        if type(expected) is not dict or expected.keys() != {"dtype", "shape", "sha256"}:
            damaged(path, f"tensor {name!r} is described as {expected!r}")
        if [expected["dtype"], expected["shape"]] != [part.get_dtype(), part.get_shape()]:
            damaged(path, f"tensor {name!r} is {part.get_dtype()} {part.get_shape()}, but should be {expected}")
    return header


def refuse_constant(name: str) -> NoReturn:
    """For NaN and infinities, which JSON does not have but Python reads."""
    raise ValueError(f"{name} is no number")


def finite_float(text: str) -> float:
    """A float as JSON writes it, unless it is beyond what a float can hold."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number")
    return number


def require_architecture(path: str, saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Raises ValueError unless the file is of a model of the same architecture."""
    names = [name for name in (*given, *saved) if saved.get(name) != given.get(name)]
    if names:
        differences = ", ".join(
            f"`{name}` {saved.get(name)!r} instead of {given.get(name)!r}" for name in dict.fromkeys(names)
        )
        raise ValueError(
            f"{path} was filled by another model, which has {differences}. Load it for the model that made it, or "
            "make the cache again with this one."
        )


def build_cache(
    path: str,
    cache_class: type[CacheType],
    config: PreTrainedConfig | PreTrainedModel,
    settings: dict[str, Any],
) -> CacheType:
    """An empty cache with the settings of the file."""
    for name, value in settings.items():
        if value is not None and type(value) not in (bool, int, float, str):
            damaged(path, f"its setting `{name}` is {value!r}")
    try:
        cache = cache_class(config, **settings)  # type: ignore[arg-type]
    except (ValueError, TypeError, ArithmeticError, OSError) as error:  # a profile may be gone
        raise ValueError(
            f"{path} holds settings with which no {cache_class.__name__} can be built: {error}"
        ) from error
    if cache.settings != settings:
        damaged(path, f"its settings {settings} are not those of a {cache_class.__name__}")
    return cache


def require_layers(path: str, header: dict[str, Any], cache: "CompressedCache") -> None:
    """Raises ValueError unless layers, and names and dtypes of tensors, are those of a cache of that class."""
    layers = header["layers"]
    if len(layers) != len(cache.layers):
        damaged(path, f"it has {len(layers)} layers, but the model has {len(cache.layers)}")
    known = set()
    for index, (saved, layer) in enumerate(zip(layers, cache.layers, strict=True)):
        kind = type(layer).__name__
        if type(saved) is not dict or saved.keys() != {"layer", "numbers"} or saved["layer"] != kind:
            damaged(path, f"layer {index} is not a {kind}")
        if type(saved["numbers"]) is not dict:
            damaged(path, f"the numbers of layer {index} are {saved['numbers']!r}")
        if isinstance(layer, CompressedLayer):
            names = (*layer.slot_tensors, *layer.row_tensors, *layer.extra_tensors)
        else:
            names = foreign_kind(index, layer).tensor_names(layer)
        known |= {f"layers.{index}.{name}" for name in names}
    unknown = sorted(header["tensors"].keys() - known)
    if unknown:
        damaged(path, f"nothing is known of its tensors {unknown}")


def read_tensor(path: str, file: Any, name: str, expected: dict[str, Any]) -> torch.Tensor:
    """A tensor of an open file, its bytes checked."""
    if expected["dtype"] not in DTYPE_NAMES.values():
        damaged(path, f"tensor {name!r} is of dtype {expected['dtype']}")
    tensor = file.get_tensor(name)
    if digest_of(tensor) != expected["sha256"]:
        damaged(path, f"tensor {name!r} does not have the SHA-256 that it had")
    return tensor.clone()  # which starts where computation expects it, unlike what was read


def read_weights(path: str, header: dict[str, Any], cache: "CompressedCache") -> dict[int, WeightFingerprint]:
    """What the file knows of the weights, by layer."""
    known = {str(layer.place.layer_idx) for layer in (cache.compressed_layers[0], cache.compressed_layers[-1])}
    found = {}
    for index, weights in header["weights"].items():
        is_complete = type(weights) is dict and weights.keys() == {"module", "dtype", "digest"}
        if index not in known or not is_complete or any(type(value) is not str for value in weights.values()):
            damaged(path, f"its weights are {header['weights']!r}")
        found[int(index)] = WeightFingerprint(**weights)
    return found


def import_layer(index: int, layer: Any, numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Fills an empty layer. What cannot be is a ValueError."""
    if not isinstance(layer, CompressedLayer):
        foreign_kind(index, layer).fill(layer, numbers, tensors)
        return
    if not {"keys", "values"} <= tensors.keys():
        raise ValueError(f"it has the tensors {sorted(tensors)}, but no keys and values")
    require_states(tensors["keys"], tensors["values"])
    require_numbers(layer, numbers)
    layer.import_state(numbers, tensors)
    if layer.device.type == "cpu":  # elsewhere it has been checked on the way
        check_layer(layer)
        layer.check_state()
    layer.release_empty_slots()


def require_numbers(layer: CompressedLayer, numbers: dict[str, Any]) -> None:
    """Raises ValueError unless the numbers have the names and types that an empty layer has."""
    if numbers.keys() != {*layer.state_numbers, *layer.row_counts, *layer.extra_numbers, "num_budget_tokens"}:
        raise ValueError(f"the numbers are {sorted(numbers)}")
    for name in layer.state_numbers:
        is_right = type(numbers[name]) is bool if type(getattr(layer, name)) is bool else is_count(numbers[name])
        if not is_right:
            raise ValueError(f"`{name}` is {numbers[name]!r}")
    for name in layer.row_counts:
        if type(numbers[name]) is not list or not all(is_count(number) for number in numbers[name]):
            raise ValueError(f"`{name}` is {numbers[name]!r}")
    num_budget_tokens = numbers["num_budget_tokens"]
    is_paid_in_bytes = layer.budget is not None and layer.budget.kind == "bytes"
    if is_paid_in_bytes != (num_budget_tokens is not None):
        raise ValueError(f"`num_budget_tokens` is {num_budget_tokens!r}")
    if is_paid_in_bytes and not (is_count(num_budget_tokens) and num_budget_tokens):
        raise ValueError(f"`num_budget_tokens` is {num_budget_tokens!r}")


def check_layer(layer: CompressedLayer) -> None:
    """Raises ValueError unless shapes, positions and counts of a layer that evicts agree."""
    batch_size, kv_heads, length = layer.keys.shape[:3]
    for name in layer.slot_tensors:
        shape = () if getattr(layer, name) is None else getattr(layer, name).shape
        if shape and (len(shape) < 3 or shape[0] != batch_size or shape[1] not in (1, kv_heads) or shape[2] != length):
            raise ValueError(f"`{name}` has the shape {tuple(shape)} in {length} slots of {batch_size} rows")
    for name in layer.row_tensors:
        tensor = getattr(layer, name)
        if tensor is not None and (tensor.dim() == 0 or tensor.shape[0] != batch_size):
            raise ValueError(f"`{name}` has the shape {tuple(tensor.shape)}, which does not fit {batch_size} rows")
    for name in layer.row_counts:
        counts = getattr(layer, name)
        if len(counts) != batch_size and (counts or name in CompressedLayer.row_counts):
            raise ValueError(f"`{name}` is {counts}, which does not fit {batch_size} rows")
    layer.require_tensor("next_position", torch.int32, batch_size, 1, 1)
    if layer.next_position.flatten().tolist() != layer.row_lengths:
        raise ValueError(f"`next_position` is not {layer.row_lengths}, the number of tokens seen")
    if not 0 < max(layer.row_lengths) <= layer.num_seen or 0 in layer.row_kept:
        raise ValueError(
            f"rows have seen {layer.row_lengths} of {layer.num_seen} tokens and may keep {layer.row_kept}"
        )
    if layer.positions is None:
        check_columns(layer)
    else:
        check_slots(layer)


def check_columns(layer: CompressedLayer) -> None:
    """Raises ValueError unless a layer that has evicted nothing holds what it has seen."""
    batch_size, length = layer.batch_size, layer.length
    row_lengths = [length] * batch_size
    if layer.column_positions is not None:
        num_columns = layer.column_positions.shape[-1]
        layer.require_tensor("column_positions", torch.int32, batch_size, 1, num_columns)
        is_token = layer.column_positions >= 0
        ranks = (is_token.cumsum(dim=-1) - 1).masked_fill(~is_token, -1)
        is_ascending = not (is_token[..., :-1] & ~is_token[..., 1:]).any()
        if num_columns > length or not torch.equal(layer.column_positions.long(), ranks):
            raise ValueError("`column_positions` do not number the tokens of each row in turn")
        if layer.columns_ascend and not is_ascending:
            raise ValueError("`columns_ascend`, but there is padding behind tokens")
        row_lengths = (is_token.sum(dim=(1, 2)) + length - num_columns).tolist()
    if length != layer.num_seen or layer.row_lengths != row_lengths or layer.row_held != row_lengths:
        raise ValueError(
            f"{length} columns hold {row_lengths} tokens, but {layer.num_seen} columns with {layer.row_lengths} were "
            f"seen, of which {layer.row_held} are held"
        )


def check_slots(layer: CompressedLayer) -> None:
    """Raises ValueError unless each slot holds a token that was seen, or none, and no token is held twice."""
    num_heads = 1 if layer.heads_share_positions else layer.keys.shape[1]
    layer.require_tensor("positions", torch.int32, layer.batch_size, num_heads, layer.length)
    if layer.column_positions is not None:
        raise ValueError("`column_positions` are of a layer that has evicted nothing")
    positions = layer.positions.sort(dim=-1).values
    if layer.length == 0 or positions.min() < -1 or (positions >= layer.next_position).any():
        raise ValueError(f"positions must be from -1 to below {layer.row_lengths}")
    if ((positions[..., 1:] == positions[..., :-1]) & (positions[..., 1:] >= 0)).any():
        raise ValueError("a token is held twice")
    held = (positions >= 0).sum(dim=-1)
    row_held = torch.tensor(layer.row_held)
    if layer.heads_keep_equal_numbers:
        is_right = (held == row_held[:, None]).all()
    else:
        is_right = (held.sum(dim=-1) == num_heads * row_held).all()
    if not is_right:
        raise ValueError(f"the slots hold {held.tolist()} tokens, but `row_held` is {layer.row_held}")


def require_agreement(path: str, cache: "CompressedCache") -> None:
    """Raises ValueError unless all layers have seen the same tokens of the same rows."""
    first = cache.compressed_layers[0]
    for layer in cache.compressed_layers:
        if (layer.num_seen, layer.row_lengths) != (first.num_seen, first.row_lengths):
            damaged(path, f"layers {first.place.layer_idx} and {layer.place.layer_idx} have not seen the same tokens")
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, CompressedLayer):
            continue
        kind = foreign_kind(index, layer)
        if kind.num_seen(layer) not in (None, first.num_seen) or kind.batch_size(layer) not in (
            None,
            first.batch_size,
        ):
            damaged(path, f"layers {first.place.layer_idx} and {index} have not seen the same tokens")
