"""The generated cases: contexts of token ids with questions and their answers, made from a seed."""

from pyramid_cache.lab.evaluation.tasks.cases import Context, Question, Task
from pyramid_cache.lab.evaluation.tasks.haystack import Haystack
from pyramid_cache.lab.evaluation.tasks.names import (
    DEFAULT_TASKS,
    TASK_FORMS,
    TASK_KINDS,
    build_contexts,
    parse_task,
    parse_tasks,
)


__all__ = [
    "DEFAULT_TASKS",
    "TASK_FORMS",
    "TASK_KINDS",
    "Context",
    "Haystack",
    "Question",
    "Task",
    "build_contexts",
    "parse_task",
    "parse_tasks",
]
