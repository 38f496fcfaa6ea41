"""Tasks of public sets: `SET:SOURCE` or `SET:SOURCE:NAME`, and their contexts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pyramid_cache.lab.evaluation.extras import import_package
from pyramid_cache.lab.evaluation.public import gsm8k, infinitebench, longbench, longbench_v2, ruler
from pyramid_cache.lab.evaluation.public.example import as_context
from pyramid_cache.lab.evaluation.tasks.cases import Context
from pyramid_cache.lab.evaluation.tasks.haystack import Haystack


PUBLIC_SETS: dict[str, ModuleType] = {
    "ruler": ruler,
    "longbench": longbench,
    "longbench-v2": longbench_v2,
    "infinitebench": infinitebench,
    "gsm8k": gsm8k,
}
PUBLIC_FORMS = (
    f"SET:SOURCE and SET:SOURCE:NAME (public sets: {', '.join(PUBLIC_SETS)}; SOURCE is a jsonl, json or parquet file or a hub id, NAME a "
    "configuration or split of it)"
)
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class PublicTask:
    """
    Questions of a public set.

    Attributes:
        kind (`str`): In `PUBLIC_SETS`.
        source (`str`): A local file, or the id of a data set on the hub.
        part (`str`): Which configuration of it, or which split; empty for the only one.
    """

    kind: str
    source: str
    part: str = ""

    @property
    def name(self) -> str:
        return ":".join(part for part in (self.kind, self.source, self.part) if part)

    @property
    def is_for_recall_model(self) -> bool:
        return False


def parse_public_task(name: str) -> PublicTask | None:
    """The task of a name such as `gsm8k:test.jsonl`; None for a name of another form."""
    kind, colon, rest = name.partition(":")
    if not colon or kind not in PUBLIC_SETS:
        return None
    source, _, part = (rest, "", "") if Path(rest).exists() else rest.partition(":")
    if not source:
        raise ValueError(f"The task {name!r} names no file and no hub id. Tasks of public sets are {PUBLIC_FORMS}.")
    return PublicTask(kind, source, part)


def load_contexts_of(task: PublicTask, haystack: Haystack, samples: int | None = None) -> list[Context]:
    """
    Reads questions of a public set.

    Args:
        task (`PublicTask`): Which, and from where.
        haystack (`Haystack`): Makes tokens of texts.
        samples (`int`, *optional*): How many, from the first on; by default all that there are.

    Raises:
        FileNotFoundError: There is no such file and no such set on the hub.
        ValueError: It cannot be read, or does not have the columns or rows of the set.
        NotImplementedError: The set's metric is not supported.
    """
    module = PUBLIC_SETS[task.kind]
    rows = load_rows(task)
    check_columns(task, rows.column_names, module.COLUMNS)
    part = task.part or Path(task.source).stem
    contexts = []
    for index in range(min(len(rows), samples or len(rows))):
        try:
            example = module.read(rows[index], part)
        except (ValueError, NotImplementedError, KeyError, IndexError, TypeError) as error:
            kind = NotImplementedError if isinstance(error, NotImplementedError) else ValueError
            raise kind(f"Row {index} of {task.source} is no question of {task.kind}: {error}.") from error
        contexts.append(as_context(task.name, example, haystack))
    if not contexts:
        raise ValueError(f"{task.source} has no rows.")
    return contexts


def load_rows(task: PublicTask) -> Any:
    """The rows of a file or of a set on the hub."""
    datasets = import_package("datasets")
    path = Path(task.source)
    if path.is_file():
        if path.suffix not in READERS:
            raise ValueError(f"{path} is no file of {', '.join(READERS)}.")
        try:
            return datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train")
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(f"{path} cannot be read: {error.__cause__ or error}") from error
        except StopIteration as error:  # of an empty file
            raise ValueError(f"{path} has no rows.") from error
    module = PUBLIC_SETS[task.kind]
    name = task.part or getattr(module, "DEFAULT_NAME", None)
    arguments = {"split": name} if module.SPLIT is None else {"name": name, "split": module.SPLIT}
    try:
        return datasets.load_dataset(task.source, **arguments)
    except (RuntimeError, OSError) as error:
        # Sets that come as a script, a hub that cannot be reached, and names that are neither file nor set.
        raise FileNotFoundError(
            f"{task.source} is no file, and as a set of the hub it cannot be read: {error} Download its file, and give that."
        ) from error


def check_columns(task: PublicTask, found: Sequence[str], wanted: Sequence[str]) -> None:
    """Raises where a set does not have the columns that it is published with."""
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(
            f"{task.source} has no columns {', '.join(missing)}, which {task.kind} has: it has {', '.join(found)}."
        )
