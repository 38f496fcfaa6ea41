"""The folder that an evaluation leaves behind, the same however often it was stopped: see docs/evaluation.md."""

import re
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pyramid_cache.engine.files import replacing
from pyramid_cache.lab.evaluation import answers
from pyramid_cache.lab.evaluation.cells import SETTINGS_FILE, read_settings
from pyramid_cache.lab.evaluation.evaluator import Evaluation
from pyramid_cache.lab.evaluation.html_page import page
from pyramid_cache.lab.evaluation.score_plots import draw_all
from pyramid_cache.lab.evaluation.score_tables import markdown
from pyramid_cache.lab.evaluation.tasks import Context
from pyramid_cache.lab.terminal import write_json


class ResultFolder:
    """Gathers what a report needs while its models are loaded, then writes it to a folder that is there."""

    def __init__(self, path: Path, announce: Callable[[str], None]) -> None:
        self.path = path
        self.announce = announce
        self.answers: list[answers.Answer] = []
        self.kept: list[answers.KeptPositions] | None = None

    def take(
        self, evaluation: Evaluation, contexts: Sequence[Context], decode: Callable[[list[int]], str] | None = None
    ) -> None:
        """Takes the answers of a finished evaluation; for the first one also what its caches keep of a context."""
        self.answers += answers.collect_answers(evaluation.results(contexts), contexts, evaluation.model, decode)
        if self.kept is None:
            self.kept = answers.measure_kept_positions(evaluation, contexts[0], self.path, self.announce)

    def write(self, record: dict[str, Any]) -> list[Path]:
        """Writes all files of a record but the cells, each in one step. Returns those that are worth a look first."""
        plots = draw_all(record["rows"], self.answers, self.kept or [])
        files = {f"plots/{plot.name}.png": plot.png for plot in plots}
        files["answers.csv"] = answers.csv_text(self.answers).encode()
        files["report.md"] = markdown(record).encode()
        files["report.html"] = page(record, plots).encode()
        (self.path / "plots").mkdir(exist_ok=True)
        # Half-written files of a run that was killed, and pictures of results that the report does not have.
        for path in [*self.path.glob("*.tmp"), *self.path.glob("plots/*")]:
            is_half = re.search(r"\.(csv|html|json|md|png)\.[0-9a-f]{16}\.tmp$", path.name)
            is_picture = re.match(r"(score|depth|positions)-.*\.png$", path.name)
            if is_half or (is_picture and f"plots/{path.name}" not in files):
                path.unlink()
        for name, content in files.items():
            with replacing(str(self.path / name)) as temporary_path:
                Path(temporary_path).write_bytes(content)
        write_json(record, self.path / "results.json")
        run = {name: record[name] for name in ("command", "settings", "versions", "machine")}
        run["finished"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        write_json(read_settings(self.path) | {"run": run}, self.path / SETTINGS_FILE)
        return [self.path / "results.json", self.path / "report.html"]
