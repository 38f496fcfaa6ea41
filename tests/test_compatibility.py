"""Two tables of docs/compatibility.md: which modes of `generate`, and which models, work with each cache. Every cell
is tested.

`python tests/test_compatibility.py --write` writes both tables anew and leaves all else alone.
"""

import sys
from pathlib import Path

import pytest
import torch
from caches import CACHE_CASES, QUICK_CASES, CacheCase
from models import ARCHITECTURES, FAMILIES, REFUSED_ARCHITECTURES, build_config
from modes import MODES, Mode, first_sentence, parametrize_modes, verdict
from transformers import AutoModelForCausalLM
from vision_models import VISION_FAMILIES, VisionRow, prompt_of, vision_model


PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
# Behind the names of models in whose rows a prompt is read.
WITH_IMAGES = " with images"
COMMAND = "python tests/test_compatibility.py --write"


def table_of(title: str, rows: dict[str, list[str]]) -> str:
    """A table of verdicts, one column a cache, with what is said against any of them in the last column."""
    lines = [f"| {title} | {' | '.join(f'`{case.name}`' for case in CACHE_CASES)} | why not |"]
    lines.append("|---" * (len(CACHE_CASES) + 2) + "|")
    for name, verdicts in rows.items():
        cells = [verdict.partition(": ")[0] for verdict in verdicts]
        reasons = dict.fromkeys(verdict.partition(": ")[2].replace("|", "\\|") for verdict in verdicts)
        lines.append(f"| {name} | {' | '.join(cells)} | {'; '.join(filter(None, reasons))} |")
    return "\n".join(lines)


def model_verdict(name: str, case: CacheCase) -> str:
    """What a constructor says to a model."""
    config = build_config(name)
    try:
        case.build_from(AutoModelForCausalLM.from_config(config) if case.from_model else config)
    except (NotImplementedError, ValueError) as error:
        return f"refused: {first_sentence(str(error))}"
    return "yes"


def vision_verdict(name: str, case: CacheCase) -> str:
    """What a cache with a tight budget says to a model and a padded batch of prompts with images."""
    model = vision_model(name)
    try:
        with torch.no_grad():
            model(
                **prompt_of(name, [VisionRow((9, 20), 1), VisionRow((6, 5, 13), 2)]), past_key_values=case.build(model)
            )
    except (NotImplementedError, ValueError) as error:
        return f"refused: {first_sentence(str(error))}"
    return "yes"


def table_of_modes() -> str:
    """What each mode of `generate` gives with each cache."""
    return table_of("`generate`", {mode.name: [verdict(mode, case) for case in CACHE_CASES] for mode in MODES})


def table_of_models() -> str:
    """What each cache says to each model."""
    rows = {
        f"`{name}`": [model_verdict(name, case) for case in CACHE_CASES]
        for name in (*FAMILIES, *ARCHITECTURES, *REFUSED_ARCHITECTURES)
        if not name.startswith("llama_")
    }
    rows |= {
        f"`{name}`{WITH_IMAGES}": [vision_verdict(name, case) for case in CACHE_CASES] for name in VISION_FAMILIES
    }
    return table_of("model", rows)


def table_in(page: str, title: str) -> str:
    """The table of a page whose first column has this title."""
    return page[page.index(f"\n| {title} | ") + 1 :].partition("\n\n")[0]


def columns_of(table: str) -> dict[str, list[str]]:
    """The cells of each column by its title."""
    rows = [line.replace("\\|", "\0").strip("| ").split(" | ") for line in table.splitlines() if " | " in line]
    rows = [[*row, ""] if len(row) < len(rows[0]) else row for row in rows]
    return {
        title.strip(): [row[index].strip().replace("\0", "\\|") for row in rows[1:]]
        for index, title in enumerate(rows[0])
    }


def assert_written(columns: dict[str, list[str]], row: int, case: CacheCase, answer: str) -> None:
    """That a cell of the page says what was answered, and its row why."""
    word, _, reason = answer.partition(": ")
    assert columns[f"`{case.name}`"][row] == word, f"Run `{COMMAND}`."
    assert reason.replace("|", "\\|") in columns["why not"][row], f"Run `{COMMAND}`."


@parametrize_modes(period=1)
def test_a_tight_budget_is_right_or_refused_as_the_page_says(mode: Mode, case: CacheCase) -> None:
    answer = verdict(mode, case)
    assert answer.startswith("refused: ") or (answer == "yes" and not mode.never_fits), answer
    columns = columns_of(table_in(PAGE.read_text(), "`generate`"))
    assert_written(columns, columns["`generate`"].index(mode.name), case, answer)


def test_caches_are_refused_to_models_as_the_page_says() -> None:
    columns = columns_of(table_in(PAGE.read_text(), "model"))
    for row, name in enumerate(columns["model"]):
        answer = vision_verdict if name.endswith(WITH_IMAGES) else model_verdict
        for case in QUICK_CASES:
            assert_written(columns, row, case, answer(name.removesuffix(WITH_IMAGES).strip("`"), case))


@pytest.mark.slow
def test_the_page_has_a_row_for_each_mode_and_model_and_a_column_for_each_cache() -> None:
    page = PAGE.read_text()
    assert table_in(page, "model") == table_of_models(), f"Run `{COMMAND}`."
    # The cells of modes are tested one by one.
    columns = columns_of(table_in(page, "`generate`"))
    assert list(columns) == ["`generate`", *(f"`{case.name}`" for case in CACHE_CASES), "why not"]
    assert columns["`generate`"] == [mode.name for mode in MODES]


if __name__ == "__main__":
    torch.set_num_threads(1)
    page = PAGE.read_text()
    for title, table in (("`generate`", table_of_modes()), ("model", table_of_models())):
        page = page.replace(table_in(page, title), table)
    (PAGE.write_text if "--write" in sys.argv else print)(page)
