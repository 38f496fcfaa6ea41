"""What measurements ran on: the machine, how busy it was, and the versions of what it ran."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def field_of(file: str, name: str) -> str | None:
    """The first value of a field in a file of Linux; None on other systems, or where the file does not have it."""
    lines = Path(file).read_text().splitlines() if Path(file).is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), None)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures are measured on, and how busy it is."""
    processor = field_of("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average_before": load_average(),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe_run(command: str, device: torch.device) -> dict[str, Any]:
    """What a record of a measurement begins with: its command, what it ran on and the versions."""
    machine = describe_machine(device)
    return {
        "command": command,
        "device": machine["accelerator"] or machine["processor"],
        "threads": torch.get_num_threads(),
        "machine": machine,
        "versions": describe_versions("triton"),
    }


def describe_end(machine: dict[str, Any]) -> dict[str, Any]:
    """What a record of a measurement ends with: what it ran on, as described before, how busy it was, versions."""
    return {"machine": machine | {"load_average_after": load_average()}, "versions": describe_versions()}


def free_memory(device: torch.device) -> int | None:
    """The bytes that can be allocated on a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = field_of("/proc/meminfo", "MemAvailable")
    return int(available.split()[0]) * 1024 if available else None


def load_average() -> float | None:
    """The processes that wanted a core in the last minute, where the system counts them."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def busy_note(machine: dict[str, Any]) -> str:
    """A warning where other work took cores from a measurement; empty where none did. From `machine` after the run."""
    load = machine["load_average_after"]
    # The measurement itself is a load of one per thread; what is beyond it and the cores has slowed it down.
    if load is None or load <= max(machine["torch_threads"], machine["cores"]) + 0.5:
        return ""
    return f" Other work kept the machine busy (load {load:.1f} on {machine['cores']} cores): do not trust the times."


def describe_versions(*more: str) -> dict[str, str | None]:
    """The versions of what every measurement runs and of some more packages, None if not installed; and Python's."""
    versions: dict[str, str | None] = {}
    for name in ("pyramid_cache", "torch", "transformers", *more):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # this package itself, where it runs from its folder
            versions[name] = None
    return versions | {"python": platform.python_version()}
