"""
Which architectures can be served. The source of a model's attention classes is read before anything runs.

A cache layer meets its queries in the attention function, which gets the key tensor that `update` returned
(`attention.py`). Without this file, a model that attends to other keys would be refused in its first forward pass
only. So the source of its architecture in transformers is read once. The keys that a cache returns must reach the
attention interface unchanged, and every argument beside them must be known here. Models from elsewhere, and
installations without source, are left to the checks of the first forward pass.
"""

import ast
import functools
import inspect
from importlib import resources

from transformers import MODEL_MAPPING, GenerationMixin, PreTrainedConfig


# The name of the cache among the arguments of models and of `generate`: `cache` from transformers 5.24 on. It warns of
# the earlier name.
CACHE_ARGUMENT = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
# Arguments of attention functions that the package reproduces, or that do not change what a query sees.
KNOWN_ARGUMENTS = {
    "attention_mask",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "dropout",
    "is_causal",
    "key",
    "max_length_k",
    "max_length_q",
    "module",
    "output_attentions",
    "position_ids",
    "query",
    "s_aux",
    "scaling",
    "sliding_window",
    "softcap",
    "value",
}
# Reasons that the flow of keys does not show.
NAMED_REASONS = {
    "bigbird_pegasus": "its decoder's attention is not marked as causal",
    "doge": "its attention hides keys by what their values are",
    "dory": "it repeats layers, for which it adds others to the cache or reads what the cache holds",
    "mllama_text_model": "some of its layers keep an image in the place of the text",
    "nllb-moe": "its decoder's attention is not marked as causal",
    "t5gemma2_decoder": "its attention mixes the keys of the encoder with those of the decoder",
}


def reason_against(config: PreTrainedConfig) -> str | None:
    """
    Why a model's attention cannot be served, by its config and its source.

    Args:
        config (`PreTrainedConfig`): The config of the decoder: `config.get_text_config(decoder=True)`.

    Returns:
        `str` or None: The second half of an error's sentence, or None if the model can be served.
    """
    if config.model_type in NAMED_REASONS:
        return NAMED_REASONS[config.model_type]
    if getattr(config, "num_kv_shared_layers", None):
        return "its last layers attend to keys that earlier layers have stored"
    if getattr(config, "reorder_and_upcast_attn", False) and config._attn_implementation == "eager":
        return "eager attention with `reorder_and_upcast_attn` does not go through the attention interface"
    reasons = _reasons_by_class(_package_of(type(config)))
    if reasons is None:
        return None
    if not reasons:
        return "it keeps no cache of keys and values"
    found = [reason for reason in reasons.values() if reason is not None]
    if found and getattr(config, "kv_lora_rank", None):
        return "it stores latents in the place of the keys that it attends to (multi-head latent attention)"
    # A file may hold attention for encoders, for images, for other settings: one class that can be served is enough.
    return found[0] if len(found) == len(reasons) else None


def _package_of(config_class: type[PreTrainedConfig]) -> str:
    """The Python package of a model: the one of its config, unless the config belongs to another architecture."""
    package = config_class.__module__.rpartition(".")[0]
    if not package.startswith("transformers.models.") or _sources(package):
        return package
    model_class = MODEL_MAPPING.get(config_class, None)
    return model_class.__module__.rpartition(".")[0] if isinstance(model_class, type) else package


@functools.cache
def _sources(package: str) -> list[str]:
    """The text of the `modeling_` files of a package; an empty list where the installation has no source."""
    files = [file for file in resources.files(package).iterdir() if file.name.startswith("modeling_")]
    return [file.read_text(encoding="utf-8") for file in files if file.name.endswith(".py")]


@functools.cache
def _reasons_by_class(package: str) -> dict[str, str | None] | None:
    """
    For each attention class that hands keys to a cache: the reason against it, or None. The function returns None if
    `package` is no package of transformers' models, or has no source.
    """
    if not package.startswith("transformers.models."):
        return None
    sources = _sources(package)
    if not sources:
        return None
    reasons: dict[str, str | None] = {}
    nodes = [node for source in sources for node in ast.parse(source).body]
    for node in [node for node in nodes if isinstance(node, ast.ClassDef)]:
        for function in [part for part in node.body if isinstance(part, ast.FunctionDef)]:
            update = _update_of(function)
            if update is not None:
                reasons[node.name] = _reason_against_class(node, function, update)
    return reasons


def _update_of(function: ast.FunctionDef) -> ast.Assign | None:
    """The last statement `key, value = cache.update(key, value, layer_idx)` of a function."""
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
    """The reason against what an attention class does after `update`, or None."""
    calls = _interface_calls(function)
    if not calls:
        is_elsewhere = any(
            isinstance(node, ast.Attribute) and node.attr == "get_interface" for node in ast.walk(class_node)
        )
        return None if is_elsewhere else "its attention does not go through the attention interface of transformers"
    stored = _names(update.targets[0])[0]
    for call in calls:
        arguments = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}
        arguments |= dict(zip(("module", "query", "key", "value", "attention_mask"), call.args, strict=False))
        unknown = sorted(arguments.keys() - KNOWN_ARGUMENTS)
        if "position_bias" in unknown:
            return "its attention adds a learned bias of positions to the logits"
        if unknown:
            return f"its attention takes `{unknown[0]}`, which is not known"
        if _names(arguments.get("key")) != [stored] or _is_set_between(function, update, call, stored):
            return "it attends to other keys than those that it stores"
    if sum(not _conditions(function, call) for call in calls) > 1:
        return "its layers attend more than once"
    return None


def _interface_calls(function: ast.FunctionDef) -> list[ast.Call]:
    """The calls of the function that `get_interface` returned."""
    interfaces: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Call):
            called = node.value.func
            if isinstance(called, ast.Attribute) and called.attr == "get_interface":
                interfaces.update(_names(node.targets[0] if isinstance(node, ast.Assign) else node.target))
    return [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and interfaces.intersection(_names(node.func))
    ]


def _is_set_between(function: ast.FunctionDef, update: ast.stmt, call: ast.Call, name: str) -> bool:
    """Whether `name` is given another value on every way from `update` to `call`."""
    known = set(_conditions(function, update))
    for node in ast.walk(function):
        if not isinstance(node, (ast.Assign, ast.AugAssign)) or not update.lineno < node.lineno < call.lineno:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        is_set = any(name in _names(target) for target in targets)
        if is_set and known.issuperset(_conditions(function, node)):
            return True
    return False


def _conditions(function: ast.FunctionDef, inner: ast.AST) -> list[ast.If]:
    """The `if` statements around a part of a function."""
    branches = [node for node in ast.walk(function) if isinstance(node, ast.If)]
    return [node for node in branches if any(child is inner for child in ast.walk(node))]


def _names(node: ast.AST | None) -> list[str]:
    """The variables in a target or an argument: a name, or the names in a tuple."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, (ast.Tuple, ast.List)):
        return [element.id for element in node.elts if isinstance(element, ast.Name)]
    return []
