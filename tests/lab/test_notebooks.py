"""The notebooks in examples/notebooks: valid, portable, and they run from top to bottom."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode


FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
MAX_NUM_BYTES = 160_000
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/(home|root|tmp|work|Users|usr|opt|mnt)/|[A-Z]:\\\\")


def read(name: str) -> NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed_by(notebook: NotebookNode) -> str:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def numbers(pattern: str, text: str) -> list[float]:
    """What the groups of the first match say."""
    found = re.search(pattern, text)
    assert found, f"{pattern} is not in\n{text}"
    return [float(group.replace(",", "")) for group in found.groups()]


def counts(pattern: str, text: str) -> dict[str, int]:
    """The number behind each name that a pattern of two groups finds."""
    return {name: int(count.replace(",", "")) for name, count in re.findall(pattern, text, re.MULTILINE)}


def check_quickstart(text: str) -> None:
    full, held, share = numbers(r"DynamicCache holds ([\d,]+) bytes, PyramidCache ([\d,]+): ([\d.]+)", text)
    prompt_length, num_layers = numbers(r"a prompt of (\d+) tokens for a model of (\d+) layers", text)
    assert full == (prompt_length + 23) * num_layers * 3 * 64 * 2 * 4
    assert share == pytest.approx(held / full, abs=0.005) and 0.4 <= share < 0.46


def check_compare_caches(text: str) -> None:
    held = counts(r"^(\w+Cache) +([\d,]+) bytes  (?:right|wrong):", text)
    assert len(held) == 8 and re.search(r"^DynamicCache .* right:", text, re.MULTILINE)
    assert all(0.24 < count / held["DynamicCache"] < 0.32 for name, count in held.items() if name != "DynamicCache")


def check_pyramid_shape_ablation(text: str) -> None:
    (full,) = numbers(r"DynamicCache: ([\d.]+)", text)
    rows = re.findall(r"decay_ratio [\d.]+: (\d+) .* (\d+) in the last, ([\d.]+) on .* perplexity ([\d.]+)", text)
    assert len(rows) == 5
    for first, last, mean, perplexity in (map(float, row) for row in rows):
        assert mean == pytest.approx(0.3 * 384, abs=0.1) and full < perplexity < 1.5 * full and first >= last - 1


def check_write_a_policy(text: str) -> None:
    assert "[inf, inf, inf, inf, 1.25, inf] expected for token 4: 1.25" in text
    (full,) = numbers(r"\(DynamicCache: ([\d.]+)\)", text)
    rows = [numbers(rf"{name} +([\d.]+) +([\d.]+) +([\d.]+)", text) for name in ("RandomTokens", "WeightedValues")]
    assert all(random > own > 0.98 * full for random, own in zip(*rows, strict=True))


def check_shadow_kv_long_document(text: str) -> None:
    (full,) = numbers(r"DynamicCache +([\d.]+) MiB on the device +0\.0 MiB", text)
    device, host = numbers(r"ShadowKVCache +([\d.]+) MiB on the device +([\d.]+) MiB", text)
    assert full == 45.0 and device < full and 0.4 * full < host < 0.5 * full
    right = counts(r"'(\w+)': '(\d) of 4'", text)
    assert right["DynamicCache"] == 4 and right["ShadowKVCache"] > right["SnapKVCache"]


def check_many_turns_chat(text: str) -> None:
    (seen,) = numbers(r"DynamicCache: (\d+) tokens seen", text)
    last = counts(r"(\w+): \d+ tokens seen, [\d,]+ bytes after one turn, ([\d,]+) after 8", text)
    assert last["DynamicCache"] == seen * 30 * 3 * 64 * 2 * 4
    # 80 tokens, eight that may wait, and positions.
    assert max(last["MassiveActivationCache"], last["StreamingLLMCache"]) < 92 * 30 * 3 * 64 * 2 * 4


CHECKS = {name.removeprefix("check_"): check for name, check in dict(globals()).items() if name.startswith("check_")}


def test_notebooks_are_valid_small_and_compile() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(CHECKS)
    assert ABSOLUTE_PATH.search('"source": "open(/home/me/x"')
    for name, check in CHECKS.items():
        path, notebook = FOLDER / f"{name}.ipynb", read(name)
        nbformat.validate(notebook)
        assert path.stat().st_size <= MAX_NUM_BYTES
        text = path.read_text(encoding="utf-8")
        assert ABSOLUTE_PATH.search(re.sub(r'"image/png": "[^"]*"', "", text)) is None, name
        for number, cell in enumerate(code_cells(notebook), start=1):
            compile(cell.source, f"{name}, cell {number}", "exec")
            # What is stored is the output of one run, warnings left out.
            assert cell.execution_count == number, name
            assert all(output.get("name") != "stderr" for output in cell.outputs), name
        check(printed_by(notebook))
        # It begins with what will be seen, and ends with a picture.
        assert "You will see" in notebook.cells[0].source, name
        assert any("image/png" in output.get("data", {}) for output in notebook.cells[-1].get("outputs", [])), name


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_notebooks_run(name: str, tmp_path: Path) -> None:
    notebook = read(name)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    CHECKS[name](printed_by(notebook))
    assert any("image/png" in output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs)
