"""
Which attention can be served, read in the source of a model's attention classes before anything runs.

A cache layer meets its queries in the attention function, by the very key tensor that `update` returned (`attention.py`).
A model that does anything else with its keys would only be noticed in its first forward pass, so its file in transformers
is read once: where keys go to the cache, they must go on from there to the attention interface as they came back, with the
model's own mask and no argument that changes the logits in a way that is not known here. What cannot be read (models from
elsewhere, files without source) is left to the checks of that first forward pass.
"""

import ast
import functools
import importlib
import inspect
from collections.abc import Iterator

from transformers import PreTrainedConfig


# What attention functions are called with and can be reproduced, or does not change what a query sees.
KNOWN_ARGUMENTS = {
    "attention_mask",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "dropout",
    "is_causal",
    "max_length_k",
    "max_length_q",
    "output_attentions",
    "position_ids",
    "s_aux",
    "scaling",
    "sliding_window",
    "softcap",
}
REASONS_AGAINST_ARGUMENTS = {
    "position_bias": "its attention adds a learned bias of positions to the logits",
    "indices": "its attention picks its own keys",
    "block_indices": "its attention picks its own keys",
}


def reason_against(config: PreTrainedConfig) -> str | None:
    """
    Why a model's attention cannot be served, as far as its config and its source tell.

    Args:
        config (`PreTrainedConfig`): Of the decoder: `config.get_text_config(decoder=True)`.

    Returns:
        `str` or None: The rest of a sentence, or None if there is nothing against the model.
    """
    if getattr(config, "num_kv_shared_layers", None):
        return "its last layers attend to keys that earlier layers have stored"
    if getattr(config, "reorder_and_upcast_attn", False) and config._attn_implementation == "eager":
        return "eager attention with `reorder_and_upcast_attn` does not go through the attention interface"
    verdicts = _verdicts(type(config).__module__)
    if verdicts is None:
        return None
    if not verdicts:
        return "it keeps no KV cache"
    reasons = [reason for reason in verdicts.values() if reason is not None]
    # A file may hold several attention classes. Only latent attention is told by the config.
    is_latent = bool(getattr(config, "kv_lora_rank", None))
    return reasons[0] if len(reasons) == len(verdicts) or (is_latent and reasons) else None


@functools.cache
def _verdicts(config_module: str) -> dict[str, str | None] | None:
    """
    For each attention class that stores keys, in the model file beside a config's, the reason against it or None; None in
    place of all if there is no such file in transformers.
    """
    package, _, name = config_module.rpartition(".configuration_")
    if not package.startswith("transformers.models."):
        return None
    try:
        source = inspect.getsource(importlib.import_module(f"{package}.modeling_{name}"))
    except (ImportError, OSError):
        return None
    verdicts: dict[str, str | None] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for function in node.body:
            update = _update_of(function) if isinstance(function, ast.FunctionDef) else None
            if update is not None:
                verdicts[node.name] = _reason_against_class(node, function, update)
    return verdicts


def _update_of(function: ast.FunctionDef) -> ast.Assign | None:
    """`key, value = past_key_values.update(key, value, layer_idx)`, the last of them."""
    updates = [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Attribute)
        and node.value.func.attr == "update"
        and len(node.value.args) + len(node.value.keywords) >= 3
        and len(_names(node.targets[0])) == 2
    ]
    return max(updates, key=lambda node: node.lineno, default=None)


def _reason_against_class(class_node: ast.ClassDef, function: ast.FunctionDef, update: ast.Assign) -> str | None:
    """What happens to the keys of `update` in a method of an attention class that is not known how to follow."""
    stored = _names(update.targets[0])[0]
    calls = _interface_calls(function)
    if not calls:
        is_elsewhere = any(
            isinstance(node, ast.Attribute) and node.attr == "get_interface" for node in ast.walk(class_node)
        )
        return None if is_elsewhere else "its attention does not go through the attention interface of transformers"
    for call in calls:
        arguments = dict(zip(("module", "query", "key", "value", "attention_mask"), call.args, strict=False))
        arguments |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}
        unknown = sorted(arguments.keys() - KNOWN_ARGUMENTS - {"module", "query", "key", "value"})
        if unknown:
            return REASONS_AGAINST_ARGUMENTS.get(unknown[0], f"its attention takes `{unknown[0]}`, which is not known")
        key = arguments.get("key")
        if key is None or _names(key) != [stored] or _is_set_after(function, update, call, stored):
            return "it attends to something else than the keys that it stores, as latent attention does"
        if _names(arguments.get("attention_mask")) == ["attention_mask"] or arguments.get("attention_mask") is None:
            continue
        if not any(_names(node) == ["attention_mask"] for node in ast.walk(arguments["attention_mask"])):
            return "its attention makes masks of its own"
    if sum(not _enclosing_branches(function, call) for call in calls) > 1:
        return "it attends more than once to the keys of a layer"
    return None


def _interface_calls(function: ast.FunctionDef) -> list[ast.Call]:
    """Calls of what `get_interface` returned."""
    interfaces: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Call):
            called = node.value.func
            if isinstance(called, ast.Attribute) and called.attr == "get_interface":
                interfaces.update(_names(node.targets[0] if isinstance(node, ast.Assign) else node.target))
    return [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and _names(node.func)[:1] and node.func.id in interfaces
    ]


def _is_set_after(function: ast.FunctionDef, update: ast.stmt, call: ast.Call, name: str) -> bool:
    """Whether `name` is given another value on every way from `update` to `call`."""
    known = set(_enclosing_branches(function, update))
    for node in ast.walk(function):
        if not isinstance(node, (ast.Assign, ast.AugAssign)) or not update.lineno < node.lineno < call.lineno:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        is_set = any(name in _names(target) for target in targets)
        if is_set and known.issuperset(_enclosing_branches(function, node)):
            return True
    return False


def _enclosing_branches(function: ast.FunctionDef, inner: ast.AST) -> list[ast.If]:
    """The conditions under which a part of a function runs."""

    def conditions() -> Iterator[ast.If]:
        for node in ast.walk(function):
            if isinstance(node, ast.If) and any(child is inner for child in ast.walk(node)):
                yield node

    return list(conditions())


def _names(node: ast.AST | None) -> list[str]:
    """The variables in a target or an argument: of a name that name, of a tuple those in it."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, (ast.Tuple, ast.List)):
        return [element.id for element in node.elts if isinstance(element, ast.Name)]
    return []
