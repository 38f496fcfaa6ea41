"""
What a profile file says, and reading it: the part of the package that caches need, without anything that draws or
prints.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from pyramid_cache.engine.fingerprint import architecture_of


FORMAT = "pyramid_cache profile"
VERSION = 1


@dataclass(frozen=True)
class Profile:
    """
    What a cache uses of a profile.

    Attributes:
        supports (`tuple[float, ...]`): Of each layer with full attention, in the order of the model: the share of all
            tokens that got 0.95 of the attention of the last queries.
        first_massive_layer (`int`, *optional*): The first layer whose output has massive activations; None where there
            were none.
    """

    supports: tuple[float, ...]
    first_massive_layer: int | None


def read_profile(path: str | os.PathLike[str], config: PreTrainedConfig, layer_indices: list[int]) -> Profile:
    """
    Reads a file that `pyramid-cache profile` wrote.

    Args:
        config (`PreTrainedConfig`): Of the model that it is to be used with.
        layer_indices (`list[int]`): The layers of that model that evict.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no profile, of another version, or of another model.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"There is no profile {str(path)!r}. Make one with `pyramid-cache profile MODEL --out {path}`."
        ) from error
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
        return as_profile(record, layer_indices)
    except (LookupError, TypeError, ValueError) as error:
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


def as_profile(record: dict[str, Any], layer_indices: list[int]) -> Profile:
    """The profile of a record. Raises LookupError, TypeError or ValueError for a record that is none."""
    found = [layer["layer"] for layer in record["layers"]]
    if found != layer_indices:
        raise ValueError(f"its layers are {found}, but those that evict are {layer_indices}")
    supports = tuple(layer["support"] for layer in record["layers"])
    if not all(0 < support <= 1.001 for support in supports):  # NaN is none of these either
        raise ValueError(f"the supports of its layers are {supports}")
    massive = record["massive"]["layers"]
    if massive is not None and not 0 <= int(massive[0]) <= int(massive[1]):
        raise ValueError(f"massive activations are in layers {massive}")
    return Profile(supports, None if massive is None else int(massive[0]))
