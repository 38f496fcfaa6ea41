"""
Caches in files: what `CompressedCache.save` writes and `load` reads.

A file is in safetensors format: tensors, and a header in JSON among the metadata. The header names the cache, its
settings, the architecture it was filled by, samples of the weights, and the numbers of each layer. Nothing in a file
is ever executed.
"""

import contextlib
import errno
import json
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

from pyramid_cache.engine.fingerprint import WeightFingerprint, architecture_of, device_of_layer
from pyramid_cache.engine.foreign import foreign_kind
from pyramid_cache.engine.layer import CompressedLayer


if TYPE_CHECKING:
    from pyramid_cache.engine.cache import CompressedCache

CacheType = TypeVar("CacheType", bound="CompressedCache")

FORMAT = "pyramid_cache"
FORMAT_VERSION = "8"
HEADER_NAMES = ("cache", "settings", "architecture", "weights", "layers")
ANEW = "Make the cache again from its prompt, and save it."


# Saving.


def save_cache(cache: "CompressedCache", path: str | os.PathLike[str]) -> None:
    """See `CompressedCache.save`."""
    path = os.path.realpath(os.fsdecode(path))
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "This is a folder: give the name of a file in it", path)
    require_savable(cache)
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
        # Layers may share a tensor, which safetensors does not write.
        if tensor.untyped_storage().data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensors[name].untyped_storage().data_ptr())
    weights = {}
    for layer in (cache.compressed_layers[0], cache.compressed_layers[-1]):
        found = layer.expected_weights if layer.module is None else WeightFingerprint.of(layer.module)
        if found is not None:
            weights[layer.place.layer_idx] = vars(found)
    contents = (type(cache).__name__, cache.settings, cache.architecture, weights, layers)
    header = json.dumps(dict(zip(HEADER_NAMES, contents, strict=True)), default=plain_number)
    metadata = {"format": FORMAT, "version": FORMAT_VERSION, "header": header}
    with replacing(path) as temporary_path:
        save_file(tensors, temporary_path, metadata=metadata)


def plain_number(number: Real) -> int | float:
    """One of numpy's, or a fraction, as JSON has it."""
    return int(number) if isinstance(number, Integral) else float(number)


def require_savable(cache: "CompressedCache") -> None:
    """Raises ValueError unless the cache tells its settings, is between two forward passes, and has seen a token."""
    if cache.settings is None:
        raise ValueError(
            f"{type(cache).__name__} does not tell its settings, so it could not be loaded again. Derive a class "
            "whose constructor takes them by name (of a `PolicyCache`: the fields of its policy; "
            "docs/write-a-policy.md has one)."
        )
    if any(layer.pending.chunks for layer in cache.compressed_layers):
        raise ValueError(
            "The cache cannot be saved while it holds tokens that may still be taken back. Settle them with "
            "`cache.crop(0)`, or take them back with `cache.crop(-n)`."
        )
    if not cache.get_seq_length():
        raise ValueError("The cache holds nothing that could be saved: run the model with it first.")
    try:
        cache.require_whole()
    except RuntimeError as error:
        raise ValueError(f"The cache cannot be saved. {error}") from error


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """A name beside `path`: what is written there replaces `path` in one step, or is removed on an error."""
    temporary_path = f"{path}.{secrets.token_hex(8)}.tmp"
    try:
        # Made here, for the permissions that a new file gets.
        with open(temporary_path, "xb") as file:
            permissions = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield temporary_path
        os.chmod(temporary_path, permissions)
        with open(temporary_path, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary_path, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary_path)
        if isinstance(error, OSError) and error.filename == temporary_path:
            raise type(error)(error.errno, error.strerror, path) from error
        raise


# Loading.


def load_cache(
    cache_class: type[CacheType],
    path: str | os.PathLike[str],
    config: Any,  # or a model
    device: torch.device | str | int | None,
    changed: dict[str, Any],
) -> CacheType:
    """See `CompressedCache.load`; `changed` are settings that take the place of those in the file."""
    path = os.fsdecode(path)
    model = config if isinstance(config, PreTrainedModel) else None
    with opened(path) as file:
        header = read_header(path, file)
        if header["cache"] != cache_class.__name__:
            raise ValueError(
                f"{path} holds a {header['cache']}, not a {cache_class.__name__}: load it with "
                f"`{header['cache']}.load`."
            )
        require_architecture(path, header["architecture"], config if model is None else model.config)
        try:
            cache = cache_class(config, **header["settings"] | changed)
        except (ValueError, TypeError, ArithmeticError, OSError) as error:  # a folder of values may be gone
            problem = f"No {cache_class.__name__} can be built with the settings in {path}"
            raise ValueError(f"{problem}: {error}") from error
        weights = {int(index): WeightFingerprint(**fields) for index, fields in header["weights"].items()}
        modules = [] if model is None else list(model.modules())
        for index, expected in weights.items():
            named = [each for each in modules if type(each).__name__ == expected.module]
            placed = [each for each in named if getattr(each, "layer_idx", None) == index]
            if len(placed) == 1:  # self-attention and attention to an encoder may share class and index
                expected.require_same(placed[0])
        found, kinds = [each["layer"] for each in header["layers"]], [type(layer).__name__ for layer in cache.layers]
        if found != kinds:
            damaged(path, f"its layers are {found} instead of {kinds}")
        for index, layer in enumerate(cache.layers):
            on_model = None if model is None else device_of_layer(model, index)
            target = torch.device(device if device is not None else on_model or "cpu")
            if target.type == "meta":
                raise ValueError(f"Layer {index} would be on the meta device. Give another one: `device=...`.")
            prefix = f"layers.{index}."
            # A copy starts where computation expects it, unlike what was read.
            tensors = {
                name.removeprefix(prefix): file.get_tensor(name).to(target, copy=True)
                for name in file.keys()
                if name.startswith(prefix)
            }
            numbers = header["layers"][index]["numbers"]
            try:
                if isinstance(layer, CompressedLayer):
                    layer.import_state(numbers, tensors)
                else:
                    foreign_kind(index, layer).fill(layer, numbers, tensors)
            except (KeyError, ValueError) as error:
                damaged(path, f"layer {index} cannot be read ({error!r})", error)
            if index in weights:
                layer.expected_weights = weights[index]
    return cache


def damaged(path: str, what: str, cause: Exception | None = None) -> NoReturn:
    """Raises ValueError for a file that `save` did not leave behind."""
    raise ValueError(f"{path} is damaged, or was not written by `save`: {what}. {ANEW}") from cause


@contextlib.contextmanager
def opened(path: str) -> Iterator[Any]:
    """A safetensors file; what is wrong with it while it is read becomes a ValueError."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is no regular file. Give the file that `save` wrote.")
    try:
        # Read, not mapped: a file that changes later must not change the cache.
        with safe_open(path, framework="pt", device="cpu", backend="pread") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): it may be truncated. {ANEW}") from error


def read_header(path: str, file: Any) -> dict[str, Any]:
    """The header of an open file."""
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
    try:
        header = json.loads(metadata["header"])
        return {name: header[name] for name in HEADER_NAMES}
    except (KeyError, TypeError, ValueError) as error:
        damaged(path, f"its header is incomplete ({error!r})", error)


def require_architecture(path: str, saved: dict[str, Any], config: PreTrainedConfig) -> None:
    """Raises ValueError unless the file is of a model of the same architecture."""
    given = architecture_of(config)
    differences = [
        f"`{name}` {saved.get(name)!r} instead of {given.get(name)!r}"
        for name in given | saved
        if saved.get(name) != given.get(name)
    ]
    if differences:
        raise ValueError(
            f"{path} was filled by another model, which has {', '.join(differences)}. Load it for the model that made "
            "it, or make the cache again with this one."
        )
