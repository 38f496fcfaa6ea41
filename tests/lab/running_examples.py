"""The scripts in examples/: run as processes, as users run them, and imported to test their parts."""

import importlib
import os
import subprocess
import sys
from functools import cache as remember
from pathlib import Path
from types import ModuleType

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pyramid_cache.lab.weights import fetch_default_model


EXAMPLES = Path(__file__).parents[2] / "examples"
# The chat template of the default model, as it was trained.
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
# 30 layers, 3 KV heads of 64 dimensions, keys and values, float32.
BYTES_PER_TOKEN = 30 * 3 * 64 * 2 * 4


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


@remember
def default_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    folder = fetch_default_model()
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
