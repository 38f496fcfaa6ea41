"""The code of README.md and of pages in docs/ runs, and prints what they say."""

import re
from pathlib import Path

import pytest
from pages import DOCS, ROOT, run_page
from running_examples import run_example


# Pages whose code is run: here, that of plots.md in test_show.py. Those of caches are in test_docs.py.
PAGES = {"evaluation.md", "index.md", "ops.md", "plots.md", "write-a-policy.md"}


@pytest.fixture(autouse=True)
def in_a_folder_with_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pages write goes to a folder that looks like the root of the repository."""
    (tmp_path / "pyramid_cache").symlink_to(ROOT / "pyramid_cache")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")


def test_every_page_with_code_is_run() -> None:
    with_code = {path.name for path in DOCS.glob("*.md") if re.search(r"^```python$", path.read_text(), re.MULTILINE)}
    assert with_code == PAGES
    assert "received" in run_page(DOCS / "ops.md", shows_output=False)


@pytest.mark.slow
def test_the_tutorial_and_the_page_of_the_evaluation_run() -> None:
    run_page(DOCS / "write-a-policy.md")
    dataset = run_page(DOCS / "evaluation.md", shows_output=False)["dataset"]
    assert len(dataset) == 5
    assert all(0.5 * 1024 < len(row["input_ids"]) <= 1024 for row in dataset)


@pytest.mark.slow
def test_the_first_page_and_the_readme_run() -> None:
    names = run_page(DOCS / "index.md", shows_output=False)
    cache, inputs = names["cache"], names["inputs"]
    assert cache.get_seq_length() == inputs.input_ids.shape[1] + 31
    # All of a quarter of everything seen, since `compress`.
    assert max(cache.num_kept_tokens()) == cache.get_seq_length() // 4
    loaded = type(cache).load("novel.safetensors", names["model"])
    assert loaded.num_kept_tokens() == cache.num_kept_tokens()
    run_page(ROOT / "README.md", shows_output=False)


@pytest.mark.slow
def test_the_script_of_the_page_of_plots_runs(model_folder: Path, tmp_path: Path) -> None:
    run_example("plot_kept_tokens.py", "--model", model_folder, "--html", "text.html", cwd=tmp_path)
    for name in ("kept-tokens.png", "kept-scores.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "text.html").read_text(encoding="utf-8").startswith("<!doctype html>")
