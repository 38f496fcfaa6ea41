"""docs/write-a-policy.md and docs/index.md: their code runs, and prints what they say."""

from pathlib import Path

import pytest
from pages import DOCS, run_page


@pytest.mark.slow
def test_the_tutorial_runs_and_prints_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    run_page(DOCS / "write-a-policy.md")


@pytest.mark.slow
def test_the_first_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real model, whose words it does not show."""
    monkeypatch.chdir(tmp_path)
    names = run_page(DOCS / "index.md", shows_output=False)
    cache, inputs = names["cache"], names["inputs"]
    assert cache.get_seq_length() == inputs.input_ids.shape[1] + 31
    # All of a quarter of everything seen, since `compress`.
    assert max(cache.num_kept_tokens()) == cache.get_seq_length() // 4
    loaded = type(cache).load("novel.safetensors", names["model"])
    assert loaded.num_kept_tokens() == cache.num_kept_tokens()
