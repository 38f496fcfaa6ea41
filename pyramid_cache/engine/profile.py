"""
What a profile file says, and reading it: the part of the package that caches need, without anything that draws or
prints.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import PreTrainedConfig

from pyramid_cache.engine.fingerprint import architecture_of


LayerClass = Literal["uniform", "local", "concentrated"]
FORMAT = "pyramid_cache profile"
VERSION = 1


@dataclass(frozen=True)
class LayerProfile:
    """
    How widely one layer looks.

    Attributes:
        layer_idx (`int`): Its index in the model.
        sink_share, local_share (`float`): What massive tokens and the last tokens got of the attention of the last
            queries.
        support (`float`): The share of all tokens that got 0.95 of it.
        kind (`str`): "uniform", "local" or "concentrated".
    """

    layer_idx: int
    sink_share: float
    local_share: float
    support: float
    kind: LayerClass


@dataclass(frozen=True)
class Profile:
    """
    What a cache uses of a profile.

    Attributes:
        layers (`tuple[LayerProfile, ...]`): Those with full attention, in the order of the model.
        massive_layers (`tuple[int, int]`, *optional*): The first and the last layer whose output has massive
            activations; None where there were none.
        num_tokens (`int`): The length of the texts that were read.
    """

    layers: tuple[LayerProfile, ...]
    massive_layers: tuple[int, int] | None
    num_tokens: int


def read_profile(path: str | os.PathLike[str], config: PreTrainedConfig) -> Profile:
    """
    Reads a file that `pyramid-cache profile` wrote.

    Args:
        config (`PreTrainedConfig`): Of the model that it is to be used with.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no profile, of another version, or of another model.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except IsADirectoryError as error:
        raise ValueError(
            f"{str(path)!r} is a folder, not a profile. Give the file that `pyramid-cache profile` wrote."
        ) from error
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{path} is no profile: it is not JSON ({error}).") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} is no profile. Make one with `pyramid-cache profile MODEL --out {path}`.")
    if record.get("version") != VERSION:
        raise ValueError(
            f"{path} is a profile of version {record.get('version')!r}, but this pyramid_cache reads version "
            f"{VERSION}. Make it again with `pyramid-cache profile`."
        )
    check_architecture(path, record.get("architecture"), architecture_of(config))
    try:
        return as_profile(record)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}). Make it again with `pyramid-cache profile`.") from error


def check_architecture(path: str | os.PathLike[str], found: object, expected: dict[str, Any]) -> None:
    """Raises ValueError if a profile is of a model with another config."""
    if not isinstance(found, dict):
        raise ValueError(f"{path} does not say which model it is of. Make it again with `pyramid-cache profile`.")
    different = [name for name, value in expected.items() if found.get(name) != value]
    if different:
        differences = "; ".join(f"{name} {found.get(name)!r} instead of {expected[name]!r}" for name in different)
        raise ValueError(
            f"{path} is the profile of another model ({differences}). Make one of this model with `pyramid-cache "
            "profile`."
        )


def as_profile(record: dict[str, Any]) -> Profile:
    """
    Raises KeyError, TypeError or ValueError for a record that cannot be.
    """
    layers = tuple(
        LayerProfile(layer["layer"], layer["sink_share"], layer["local_share"], layer["support"], layer["kind"])
        for layer in record["layers"]
    )
    indices = [layer.layer_idx for layer in layers]
    if not layers or any(type(index) is not int for index in indices) or indices != sorted(set(indices)):
        raise ValueError(f"its layers are {indices}")
    for layer in layers:
        shares = (layer.sink_share, layer.local_share, layer.support)
        if not all(math.isfinite(share) and 0 <= share <= 1.001 for share in shares) or layer.support == 0:
            raise ValueError(f"the shares of layer {layer.layer_idx} are {shares}")
        if layer.kind not in get_args(LayerClass):
            raise ValueError(f"layer {layer.layer_idx} is {layer.kind!r}")
    massive = record["massive"]["layers"]
    num_tokens = record["settings"]["num_tokens"]
    if type(num_tokens) is not int or num_tokens < 1:
        raise ValueError(f"its texts have {num_tokens!r} tokens")
    if massive is not None and not 0 <= int(massive[0]) <= int(massive[1]):
        raise ValueError(f"massive activations are in layers {massive}")
    return Profile(layers, None if massive is None else (int(massive[0]), int(massive[1])), num_tokens)
