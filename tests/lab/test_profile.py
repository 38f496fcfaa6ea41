"""`pyramid-cache profile` on a tiny model with planted massive activations: what it finds, writes, prints and reads again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from massive_models import MASSIVE_DIMENSION, MASSIVE_TOKEN, massive_model
from text_tokenizers import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pyramid_cache.engine.profile import read_profile
from pyramid_cache.engine.scoring import sum_of_probabilities
from pyramid_cache.lab.cli import main
from pyramid_cache.lab.profile import activations


# With one token per byte in alphabetical order, this is the massive one.
MASSIVE_LETTER = byte_tokenizer().decode([MASSIVE_TOKEN])
TEXT = ("nothing much went on there" * 4 + MASSIVE_LETTER + "and on it went ") * 12


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The massive model, with a token for each byte, and its tokenizer."""
    model = massive_model(magnitude=1e4, vocab_size=257)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def profile(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The file that the command wrote for three texts of 150 tokens."""
    folder = tmp_path_factory.mktemp("profile")
    (folder / "text.txt").write_text(TEXT)
    path = folder / "profile.json"
    arguments = ["--out", str(path), "--plot", str(folder / "plot.png"), "--text", str(folder / "text.txt")]
    arguments += ["--tokens", "150", "--num-texts", "3", "--window", "16", "--device", "cpu"]
    assert main(["profile", str(model_folder), *arguments]) == 0
    return path, json.loads(path.read_text())


def test_massive_dimensions_tokens_and_layers(profile: tuple[Path, dict[str, Any]]) -> None:
    _, record = profile
    massive = record["massive"]
    assert massive["layers"] == [0, 3]
    assert [row["dimension"] for row in massive["dimensions"]] == [MASSIVE_DIMENSION]
    assert massive["dimensions"][0]["largest"] == pytest.approx(1e4, rel=0.01)
    # Three stretches, from the start, the middle and the end of the text, each token of which is a byte.
    starts = [index * (len(TEXT) - 150) // 2 for index in range(3)]
    wanted = [
        (text, position)
        for text, start in enumerate(starts)
        for position in range(150)
        if TEXT[start + position] == MASSIVE_LETTER
    ]
    assert [(row["text"], row["position"]) for row in massive["tokens"]] == wanted
    assert {row["token"] for row in massive["tokens"]} == {MASSIVE_LETTER}
    assert [row["num_massive_tokens"] for row in record["outputs"]] == [len(wanted)] * 4
    for row in record["layers"]:
        assert row["num_by_keys_and_values"] == len(wanted)
        assert row["agreement"] == (1 if row["layer"] else 0)


def test_shares_and_support_against_probabilities(model_folder: Path, profile: tuple[Path, dict[str, Any]]) -> None:
    """The first text once more, with the probabilities of the model's own eager attention."""
    model = LlamaForCausalLM.from_pretrained(model_folder, attn_implementation="eager").eval()
    ids = torch.tensor([byte_tokenizer()(TEXT)["input_ids"][:150]])
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    massive = [position for position in range(150) if TEXT[position] == MASSIVE_LETTER]
    findings = activations.measure_text(model, byte_tokenizer(), ids, 16)
    for layer, probabilities in enumerate(attentions):
        sums = sum_of_probabilities(probabilities[:, :, -16:], 2, None)[0] / (16 * 2)
        sinks = sums[:, massive].sum(dim=-1).mean().item()
        local = (
            sums[:, 134:].sum(dim=-1).mean().item() - sums[:, [p for p in massive if p >= 134]].sum(-1).mean().item()
        )
        supports = []
        for shares in sums.tolist():
            covered = {p for p in range(150) if p in massive or p >= 134}
            rest = sorted((p for p in range(150) if p not in covered), key=lambda p: -shares[p])  # noqa: B023
            while sum(shares[p] for p in covered) < 0.95:
                covered.add(rest.pop(0))
            supports.append(len(covered) / 150)
        found = findings.layers[layer]
        assert found.sink_share == pytest.approx(sinks, abs=1e-5)
        assert found.local_share == pytest.approx(local, abs=1e-5)
        assert found.support == pytest.approx(sum(supports) / 2, abs=1e-5)


def test_what_is_printed_and_drawn(
    model_folder: Path, profile: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, _ = profile
    picture = (path.parent / "plot.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    text = path.parent / "text.txt"
    arguments = ["--text", str(text), "--tokens", "40", "--num-texts", "1", "--window", "8", "--device", "cpu"]
    main(["profile", str(model_folder), "--out", str(tmp_path / "p.json"), *arguments])
    printed = capsys.readouterr().out
    assert "No activation is massive" in printed  # the first letter of its kind comes later
    main(["profile", str(model_folder), "--out", str(tmp_path / "p.json"), "--text", str(text), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "outputs of layers 0 to 3" in printed
    assert repr(MASSIVE_LETTER) in printed


def test_no_model_is_changed(model_folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(model_folder)
    activations.measure_text(model, byte_tokenizer(), torch.randint(0, 257, (1, 60)), 8)
    assert not any(layer._forward_hooks for layer in model.model.layers)


def with_changes(record: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy of a profile with other values at dotted paths."""
    record = json.loads(json.dumps(record))
    for path, value in changes.items():
        *parents, name = path.split("__")
        place: Any = record
        for parent in parents:
            place = place[int(parent) if parent.isdecimal() else parent]
        place[name] = value
    return record


class TestReading:
    def test_what_caches_use(self, profile: tuple[Path, dict[str, Any]], model_folder: Path) -> None:
        path, record = profile
        found = read_profile(path, LlamaConfig.from_pretrained(model_folder))
        assert [layer.support for layer in found.layers] == [row["support"] for row in record["layers"]]
        assert [layer.kind for layer in found.layers] == [row["kind"] for row in record["layers"]]
        assert (found.massive_layers, found.num_tokens) == ((0, 3), 150)

    def test_another_model_is_refused(self, profile: tuple[Path, dict[str, Any]], model_folder: Path) -> None:
        config = LlamaConfig.from_pretrained(model_folder, num_hidden_layers=5)
        with pytest.raises(ValueError, match="num_hidden_layers 4 instead of 5"):
            read_profile(profile[0], config)

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"format": "other"}, "is no profile"),
            ({"version": 2}, "version 2"),
            ({"architecture": None}, "does not say which model"),
            ({"layers": []}, "damaged"),
            ({"layers__1__layer": 0}, "damaged"),
            ({"layers__1__support": 0.0}, "damaged"),
            ({"layers__1__support": 7.0}, "damaged"),
            ({"layers__1__kind": "dense"}, "damaged"),
            ({"layers__1__sink_share": "much"}, "damaged"),
            ({"massive": {}}, "damaged"),
            ({"massive__layers": [3, 1]}, "damaged"),
            ({"settings__num_tokens": None}, "damaged"),
        ],
    )
    def test_other_files_are_refused(
        self,
        profile: tuple[Path, dict[str, Any]],
        model_folder: Path,
        tmp_path: Path,
        changes: dict[str, Any],
        message: str,
    ) -> None:
        path = tmp_path / "profile.json"
        path.write_text(json.dumps(with_changes(profile[1], **changes)))
        with pytest.raises(ValueError, match=message):
            read_profile(path, LlamaConfig.from_pretrained(model_folder))

    def test_what_is_no_json_is_refused(self, model_folder: Path, tmp_path: Path) -> None:
        config = LlamaConfig.from_pretrained(model_folder)
        path = tmp_path / "profile.json"
        path.write_bytes(b"\xff\xfe{}")
        with pytest.raises(ValueError, match="is not JSON"):
            read_profile(path, config)
        path.write_text("[]")
        with pytest.raises(ValueError, match="pyramid-cache profile MODEL --out"):
            read_profile(path, config)
        with pytest.raises(FileNotFoundError):
            read_profile(tmp_path / "missing.json", config)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out", "missing/p.json"], "must be a file in a folder that exists"),
        (["--out", "p.json", "--plot", "."], "--plot . cannot be written"),
        (["--out", "p.json", "--plot", "p.doc"], "must end in one of"),
        (["--out", "p.json", "--text", "missing.txt"], "is no file"),
        (["--out", "p.json", "--tokens", "64"], "must exceed the window of 64"),
        (["--out", "p.json", "--tokens", "9000"], "exceeds the 8192 positions"),
        (["--out", "p.json", "--tokens", "8000", "--text", "short.txt"], "Give fewer, or a longer --text"),
    ],
)
def test_bad_options_are_refused(
    arguments: list[str],
    message: str,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("short")
    assert main(["profile", str(model_folder), *arguments, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


class Unlisted(torch.nn.Module):
    """A decoder without a list of layers."""


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    model: PreTrainedModel = massive_model(magnitude=1e4)
    model.get_decoder = Unlisted
    with pytest.raises(NotImplementedError, match="no list of 4 decoder layers"):
        activations.measure_text(model, byte_tokenizer(), torch.zeros(1, 20, dtype=torch.long), 8)
