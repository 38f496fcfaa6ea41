"""Arguments in docstrings, as griffe and mkdocstrings read them.

Hugging Face writes `name (`float` or `int`, defaults to 0.2): ...`. The API page shows the signature as well, with
what is optional and the defaults. So the type alone is left: `name (float | int): ...`. Arguments that share a line,
`key, value (`torch.Tensor`): ...`, become one each.
"""

import re
from typing import Any

import griffe


# Names, a type between parentheses, and all lines that are indented further.
ENTRY = re.compile(r"^( +)(\w+(?:, \w+)*)(?: \((`[^\n]*?)\))?:( [^\n]*(?:\n\1 [^\n]*|\n(?=\n\1 ))*)", re.MULTILINE)
RETURNED = re.compile(r"^( +)(`[^\n`]+`(?: or [\w`]+)*):(?= )", re.MULTILINE)
SECTIONS = re.compile(r"^( *)(Args|Attributes|Returns|Yields):\n((?:\1 +[^\n]*\n?|\n(?=\1 ))*)", re.MULTILINE)


def plain_type(text: str) -> str:
    """A type as Python writes it: of "`float` or `int`, defaults to 0.2" the words in backticks."""
    found = re.findall(r"`([^`]+)`|\bor (None)\b", re.sub(r", defaults to .*", "", text))
    return " | ".join(name or none for name, none in found)


def plain_entry(match: re.Match[str]) -> str:
    indent, names, types, text = match.groups()
    kind = "" if types is None else f" ({plain_type(types)})"
    return "\n".join(f"{indent}{name}{kind}:{text}" for name in names.split(", "))


def plain_section(match: re.Match[str]) -> str:
    indent, title, text = match.groups()
    if title in ("Args", "Attributes"):
        text = ENTRY.sub(plain_entry, text)
    else:
        text = RETURNED.sub(lambda found: f"{found[1]}{plain_type(found[2])}:", text, count=1)
    return f"{indent}{title}:\n{text}"


class HuggingFaceTypes(griffe.Extension):
    """Rewrites each docstring when it is read."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = SECTIONS.sub(plain_section, obj.docstring.value)
