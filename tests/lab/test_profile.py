"""`pyramid-cache profile` on a tiny model with massive activations: what it finds, writes and prints."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from massive_models import MASSIVE_DIMENSION, MASSIVE_TOKEN, massive_model
from text_tokenizers import byte_tokenizer
from transformers import LlamaForCausalLM

from pyramid_cache.engine.scoring import sum_of_probabilities
from pyramid_cache.lab.cli import main
from pyramid_cache.lab.profile import activations


# With one token per byte in alphabetical order, this is the massive one.
MASSIVE_LETTER = byte_tokenizer().decode([MASSIVE_TOKEN])
TEXT = ("nothing much went on there" * 4 + MASSIVE_LETTER + "and on it went ") * 12


def test_massive_by_definition() -> None:
    """Of median 1, 1000 is massive and 999 is not. Of median 0.05, what exceeds 100 is massive."""
    for size, places, massive in ((1.0, {6: -1000.0, 7: 999.0}, 6), (0.05, {5: 100.0, 8: -100.5}, 8)):
        states = torch.full((1, 9, 5), size)
        for position, value in places.items():
            states[0, position, 3] = value
        found = activations.measure_output(states)
        assert found.median == pytest.approx(size) and found.entries == [(massive, 3, places[massive])]


def run_profile(model_folder: Path, folder: Path, *options: str) -> dict[str, Any]:
    """Runs the command on a CPU, and returns what it wrote."""
    (folder / "text.txt").write_text(TEXT)
    arguments = [str(model_folder), "--out", str(folder / "p.json"), "--text", str(folder / "text.txt"), *options]
    assert main(["profile", *arguments, "--device", "cpu"]) == 0
    return json.loads((folder / "p.json").read_text())


def test_massive_dimensions_tokens_and_layers(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = run_profile(model_folder, tmp_path, *"--tokens 40 --num-texts 1 --window 8".split())
    assert record["massive"]["layers"] is None  # the first letter of its kind comes later
    assert "No activation is massive" in capsys.readouterr().out
    options = "--tokens 150 --num-texts 3 --window 16 --plot".split()
    record = run_profile(model_folder, tmp_path, *options, str(tmp_path / "plot.png"))
    printed = capsys.readouterr().out
    assert "outputs of layers 0 to 3" in printed and repr(MASSIVE_LETTER) in printed
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    massive = record["massive"]
    assert massive["layers"] == [0, 3]
    assert [row["dimension"] for row in massive["dimensions"]] == [MASSIVE_DIMENSION]
    assert massive["dimensions"][0]["largest"] == pytest.approx(1e4, rel=0.01)
    # Three stretches, from the start, the middle and the end of the text, each token of which is a byte.
    starts = [index * (len(TEXT) - 150) // 2 for index in range(3)]
    places = itertools.product(range(3), range(150))
    wanted = [(text, place) for text, place in places if TEXT[starts[text] + place] == MASSIVE_LETTER]
    assert [(row["text"], row["position"]) for row in massive["tokens"]] == wanted
    assert {row["token"] for row in massive["tokens"]} == {MASSIVE_LETTER}
    assert [row["num_massive_tokens"] for row in record["outputs"]] == [len(wanted)] * 4
    for row in record["layers"]:
        assert row["num_by_keys_and_values"] == len(wanted)
        assert row["agreement"] == (1 if row["layer"] else 0)


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
        found = findings.layers[layer].spread
        assert found.sink_share == pytest.approx(sums[:, sorted(massive)].sum(dim=-1).mean().item(), abs=1e-5)
        assert found.local_share == pytest.approx(sums[:, sorted(local)].sum(dim=-1).mean().item(), abs=1e-5)
        assert found.support == pytest.approx(sum(supports) / 2, abs=1e-5)


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    model = massive_model(magnitude=1e4)
    model.get_decoder = torch.nn.Module
    with pytest.raises(NotImplementedError, match="no list of 4 decoder layers"):
        activations.measure_text(model, byte_tokenizer(), torch.zeros(1, 20, dtype=torch.long), 8)
