"""The scripts in examples/: run as processes, as users run them, and imported to test their parts."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType


EXAMPLES = Path(__file__).parents[2] / "examples"


def import_example(name: str) -> ModuleType:
    """A script as a module; those that it imports from its own folder are found as when it runs."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module(name)


def run_example(name: str, *arguments: object, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a script, which must end with the status."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    finished = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=cwd, env=environment, timeout=600)
    assert finished.returncode == status, finished.stderr
    assert "Traceback" not in finished.stderr
    return finished
