"""Packages of the extra `eval`, imported where they are used."""

import importlib
from types import ModuleType


def import_package(name: str) -> ModuleType:
    """
    Imports a package that comes with the extra `eval`.

    Raises:
        ModuleNotFoundError: It is not installed; the message says how to.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name != package:
            raise
        raise ModuleNotFoundError(
            f"The package `{package}` is missing; run: pip install 'pyramid_cache[eval]'", name=package
        ) from error
