"""What every record of a measurement begins with."""

from typing import Any

import torch

from pyramid_cache.lab.machine import describe_versions


VERSIONS = ("pyramid_cache", "torch", "transformers", "triton")


def start_record(command: str, machine: dict[str, Any]) -> dict[str, Any]:
    """How it was measured and on what: "command", "device", its name; "threads"; "machine", of `describe_machine`; "versions"."""
    return {
        "command": command,
        "device": machine["accelerator"] or machine["processor"],
        "threads": torch.get_num_threads(),
        "machine": machine,
        "versions": describe_versions(*VERSIONS),
    }
