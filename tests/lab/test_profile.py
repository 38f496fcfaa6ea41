"""`pyramid-cache profile` on a tiny model with massive activations: what it finds, writes, prints and reads again."""

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
    path, record = profile
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
    picture = (path.parent / "plot.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_shares_and_support_against_probabilities(model_folder: Path) -> None:
    """The first text again, with the probabilities of the model's own eager attention. The model stays as it is."""
    model = LlamaForCausalLM.from_pretrained(model_folder, attn_implementation="eager").eval()
    ids = torch.tensor([byte_tokenizer()(TEXT)["input_ids"][:150]])
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    massive = {position for position in range(150) if TEXT[position] == MASSIVE_LETTER}
    local = set(range(134, 150)) - massive
    hooks = [len(layer._forward_hooks) for layer in model.model.layers]
    findings = activations.measure_text(model, byte_tokenizer(), ids, 16)
    assert [len(layer._forward_hooks) for layer in model.model.layers] == hooks
    for layer, probabilities in enumerate(attentions):
        sums = sum_of_probabilities(probabilities[:, :, -16:], 2, None)[0] / (16 * 2)
        supports = []
        for shares in sums.tolist():
            covered = massive | local
            rest = sorted(set(range(150)) - covered, key=lambda position: -shares[position])  # noqa: B023
            while sum(shares[position] for position in covered) < 0.95:
                covered.add(rest.pop(0))
            supports.append(len(covered) / 150)
        found = findings.layers[layer]
        assert found.sink_share == pytest.approx(sums[:, sorted(massive)].sum(dim=-1).mean().item(), abs=1e-5)
        assert found.local_share == pytest.approx(sums[:, sorted(local)].sum(dim=-1).mean().item(), abs=1e-5)
        assert found.support == pytest.approx(sum(supports) / 2, abs=1e-5)


def test_what_is_printed(
    model_folder: Path, profile: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = profile[0].parent / "text.txt"
    arguments = [
        "profile",
        str(model_folder),
        "--out",
        str(tmp_path / "p.json"),
        "--text",
        str(text),
        "--device",
        "cpu",
    ]
    main([*arguments, "--tokens", "40", "--num-texts", "1", "--window", "8"])
    printed = capsys.readouterr().out
    assert "No activation is massive" in printed  # the first letter of its kind comes later
    main(arguments)
    printed = capsys.readouterr().out
    assert "outputs of layers 0 to 3" in printed
    assert repr(MASSIVE_LETTER) in printed


class TestReading:
    def test_what_caches_use(self, profile: tuple[Path, dict[str, Any]], model_folder: Path) -> None:
        path, record = profile
        found = read_profile(path, LlamaConfig.from_pretrained(model_folder))
        assert [layer.support for layer in found.layers] == [row["support"] for row in record["layers"]]
        assert [layer.kind for layer in found.layers] == [row["kind"] for row in record["layers"]]
        assert (found.massive_layers, found.num_tokens) == ((0, 3), 150)
        other = LlamaConfig.from_pretrained(model_folder, num_hidden_layers=5)
        with pytest.raises(ValueError, match="num_hidden_layers 4 instead of 5"):
            read_profile(path, other)

    @pytest.mark.parametrize(
        "place, value, message",
        [
            (["format"], "other", "is no profile"),
            (["version"], 2, "version 2"),
            (["architecture"], None, "does not say which model"),
            (["layers"], [], "damaged"),
            (["layers", 1, "layer"], 0, "damaged"),
            (["layers", 1, "support"], 0.0, "damaged"),
            (["layers", 1, "support"], 7.0, "damaged"),
            (["layers", 1, "kind"], "dense", "damaged"),
            (["layers", 1, "sink_share"], "much", "damaged"),
            (["massive"], {}, "damaged"),
            (["massive", "layers"], [3, 1], "damaged"),
            (["settings", "num_tokens"], None, "damaged"),
        ],
    )
    def test_other_files_are_refused(
        self,
        profile: tuple[Path, dict[str, Any]],
        model_folder: Path,
        tmp_path: Path,
        place: list[str | int],
        value: Any,
        message: str,
    ) -> None:
        record = json.loads(profile[0].read_text())
        part = record
        for name in place[:-1]:
            part = part[name]
        part[place[-1]] = value
        path = tmp_path / "profile.json"
        path.write_text(json.dumps(record))
        with pytest.raises(ValueError, match=message):
            read_profile(path, LlamaConfig.from_pretrained(model_folder))

    def test_what_is_no_json_is_refused(self, model_folder: Path, tmp_path: Path) -> None:
        config = LlamaConfig.from_pretrained(model_folder)
        path = tmp_path / "profile.json"
        for content, message in ((b"\xff\xfe{}", "is not JSON"), (b"[]", "pyramid-cache profile MODEL --out")):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=message):
                read_profile(path, config)
        with pytest.raises(FileNotFoundError):
            read_profile(tmp_path / "missing.json", config)


class Unlisted(torch.nn.Module):
    """A decoder without a list of layers."""


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    model: PreTrainedModel = massive_model(magnitude=1e4)
    model.get_decoder = Unlisted
    with pytest.raises(NotImplementedError, match="no list of 4 decoder layers"):
        activations.measure_text(model, byte_tokenizer(), torch.zeros(1, 20, dtype=torch.long), 8)
