"""
Rotary angles of a model, so that stored keys can be moved to other positions.

A model rotates queries and keys before a cache sees them. RoPE enters a score only through the difference of the two
angles, so a key is moved by rotating it once more, by the difference between the angle it should have and the angle it
has. Two kinds of angle are needed for that:

- the model's: `float32(position) * float32(inverse frequency)`, whose rounding error grows with the position (up
  to 0.03 radians at position 1,000,000), and
- the exact one: the same product in float64.

`rotate(states, angles(position - base) - model_angles(position, longest))` replaces the first by the second. Whatever
factor the model multiplies cosines and sines with (yarn, longrope) sits in the states already and is never touched.

Nothing here knows a model family. The frequencies are read from the model file's own rotary module and compared with
its cosines; which dimensions turn, and how they are paired, is found by running the attention module itself up to the
point where it hands its keys to the cache, once at position zero and once at others. What cannot be reproduced that
way is refused.
"""

import copy
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel


# Primes near the powers of eight: all exact in float32, and far enough apart that slow pairs turn too.
PROBE_POSITIONS = (1, 7, 61, 509, 4093, 32749, 262139, 2097143)

# What `export_frequencies` calls its tensors.
FREQUENCY_TENSORS = ("inv_freq", "long_inv_freq")

WAY_OUT = "Use a cache that leaves keys at the positions the model gave them."


@dataclass(frozen=True, eq=False)
class RotaryFrequencies:
    """
    How one attention layer rotates its keys: the first `rotary_dim` dimensions of each head, by these frequencies.

    Attributes:
        inv_freq: `(rotary_dim / 2,)` inverse frequencies in float32, as the model multiplies them with positions.
            Negative for a model that turns the other way.
        layout: `"half"` pairs dimension `i` with `i + rotary_dim / 2` (Llama); `"interleaved"` pairs `2 i` with
            `2 i + 1` (GLM, Cohere).
        long_inv_freq: `(rotary_dim / 2,)`, longrope only: what replaces `inv_freq` in a forward that reaches beyond
            `original_max_position_embeddings`.
        original_max_position_embeddings: Longrope only: the longest forward that still uses `inv_freq`, in tokens.
    """

    inv_freq: torch.Tensor
    layout: Literal["half", "interleaved"] = "half"
    long_inv_freq: torch.Tensor | None = None
    original_max_position_embeddings: int | None = None

    def equals(self, other: "RotaryFrequencies") -> bool:
        """Whether both rotate alike."""
        if (self.long_inv_freq is None) != (other.long_inv_freq is None):
            return False
        return (
            self.layout == other.layout
            and self.original_max_position_embeddings == other.original_max_position_embeddings
            and torch.equal(self.inv_freq, other.inv_freq.to(self.inv_freq.device))
            and (
                self.long_inv_freq is None
                or torch.equal(self.long_inv_freq, other.long_inv_freq.to(self.long_inv_freq.device))
            )
        )

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head are rotated."""
        return 2 * self.inv_freq.shape[-1]

    def model_angles(self, positions: torch.Tensor, longest: int | torch.Tensor) -> torch.Tensor:
        """
        The angles that the model's float32 arithmetic used.

        Args:
            positions: `(...)` token positions of one forward, any integer dtype.
            longest: The largest position of that forward, over all rows, plus one. It decides between the short and
                the long frequencies of longrope. A tensor without dimensions avoids a synchronisation with the host.

        Returns:
            `(..., rotary_dim / 2)` in float64.
        """
        inv_freq = self.inv_freq.to(positions.device)
        if self.long_inv_freq is not None:
            long_inv_freq = self.long_inv_freq.to(positions.device)
            if isinstance(longest, torch.Tensor):
                is_long = longest.to(positions.device) > self.original_max_position_embeddings
                inv_freq = torch.where(is_long, long_inv_freq, inv_freq)
            elif longest > self.original_max_position_embeddings:
                inv_freq = long_inv_freq
        return (positions[..., None].float() * inv_freq).double()

    def angles(self, positions: torch.Tensor) -> torch.Tensor:
        """
        The exact angles, for longrope those of the short frequencies.

        Args:
            positions: `(...)` positions or differences of positions, any integer dtype.

        Returns:
            `(..., rotary_dim / 2)` in float64.
        """
        return positions[..., None].double() * self.inv_freq.to(positions.device).double()

    def rotate(self, states: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """
        Turn queries or keys by the given angles.

        The turn is computed in float32 (float64 for float64 states) from cosines and sines of float64 angles, and
        rounded once to the dtype of `states`. `states` is left as it is.

        Args:
            states: `(batch, heads, seq, head_dim)`.
            angles: `(batch or 1, heads or 1, seq or 1, rotary_dim / 2)`, usually a difference of two angles.

        Returns:
            `(batch, heads, seq, head_dim)` in the dtype of `states`.
        """
        return self.turn(states, *self.cosine_and_sine(angles, states.dtype))

    def cosine_and_sine(self, angles: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Of float64 angles, in the precision in which states of `dtype` are turned."""
        compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return angles.double().cos().to(compute_dtype), angles.double().sin().to(compute_dtype)

    def turn(self, states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        """`rotate` by angles whose `cosine_and_sine` are known."""
        compute_dtype = cosine.dtype
        rotated = states[..., : self.rotary_dim].to(compute_dtype)
        if self.layout == "half":
            first, second = rotated.chunk(2, dim=-1)
        else:
            first, second = rotated[..., 0::2], rotated[..., 1::2]
        first, second = first * cosine - second * sine, second * cosine + first * sine
        if self.layout == "half":
            rotated = torch.cat([first, second], dim=-1)
        else:
            rotated = torch.stack([first, second], dim=-1).flatten(-2)
        rotated = rotated.to(states.dtype)
        if self.rotary_dim == states.shape[-1]:
            return rotated
        return torch.cat([rotated, states[..., self.rotary_dim :]], dim=-1)


class _KeysReached(Exception):
    """Ends an attention forward where it hands over its keys: the rest of it is not needed."""


class _Recorder(DynamicCache):
    """A cache that records the first keys and values it is given and stops the forward there."""

    def __init__(self) -> None:
        super().__init__()
        # Decoders beside an encoder ask an `EncoderDecoderCache` for these.
        self.is_updated: dict[int, bool] = {}
        self.self_attention_cache = self

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.recorded = (key_states.detach(), value_states.detach())
        raise _KeysReached


@torch.no_grad()
def rotary_frequencies(
    attention_module: nn.Module,
    config: PreTrainedConfig,
    layer_type: str | None = None,
    model: PreTrainedModel | None = None,
    device: torch.device | None = None,
) -> RotaryFrequencies | None:
    """
    Find out how an attention module rotates its keys.

    The attention module is run on a few random tokens up to its cache update, so its weights must be loaded. Its
    hooks are not called and nothing of it, of `model` or of the global random state changes. Not traceable: call it
    outside of a compiled region.

    Args:
        attention_module: The attention layer, as transformers passes it to attention functions.
        config: The model's config. Of a composite config, the text decoder's is taken.
        layer_type: The entry of `config.layer_types` for this layer. Only read where RoPE differs between layer types,
            and found from `attention_module.layer_idx` if left out.
        model: The model that `attention_module` belongs to. Its own rotary module is measured then, which matters
            after `model.to(torch.bfloat16)`: that rounds the inverse frequencies too, and neither the attention module
            nor the config can tell. Without a model, the frequencies are those that the config gives in float32, as
            `from_pretrained` and `from_config` leave them at any dtype.

        device: Where the module computes, if that is not where its weights are: accelerate brings offloaded ones there
            for each forward.

    Returns:
        The frequencies, or `None` if keys do not depend on positions (GPT-2, OPT, ALiBi, layers without RoPE).

    Raises:
        NotImplementedError: The frequencies depend on the length (dynamic NTK), positions have several axes (mrope),
            or the rotation could not be reproduced.
        ValueError: `attention_module` is not part of `model`.
    """
    config = config.get_text_config(decoder=True)
    name = type(attention_module).__name__
    sources = _source_modules(attention_module)
    by_its_class = _mentions_rotation(dir(type(attention_module))) or "position_embeddings" in _forward_names(
        attention_module
    )
    if getattr(config, "alibi", False) or not (by_its_class or any(_mentions_rotation(vars(s)) for s in sources)):
        return None
    # Granite hybrids build no rotary module for any other value than "rope".
    embedding_type = getattr(config, "position_embedding_type", None)
    if isinstance(embedding_type, str) and embedding_type not in ("rope", "rotary"):
        return None

    parameter = next(attention_module.parameters(), None)
    if device is None:
        device = torch.device("cpu") if parameter is None else parameter.device
    if device.type == "meta":
        raise NotImplementedError(
            f"The weights of {name} are on the meta device, so its rotary embedding cannot be probed. Load the "
            "weights before the first forward with this cache."
        )
    if layer_type is None:
        layer_types, layer_idx = getattr(config, "layer_types", None), getattr(attention_module, "layer_idx", None)
        if layer_types is not None and layer_idx is not None and layer_idx < len(layer_types):
            layer_type = layer_types[layer_idx]
    parameters = _rope_parameters(config, layer_type)
    _refuse_by_name(name, parameters or {})

    if model is not None and all(module is not attention_module for module in model.modules()):
        raise ValueError(
            f"{name} is no part of the given {type(model).__name__}. Pass the model that the cache is used with."
        )
    classes = _rotary_classes(sources)
    rotary_modules = _rotary_modules(attention_module, config, classes, model)
    if not rotary_modules or parameters is None:
        # The file knows rotations, but this layer may not use them (Jamba; Beam's full attention): its keys decide.
        return _measure_layer(attention_module, config, None, layer_type, parameters or {}, device)
    failures: list[str] = []
    for rotary in rotary_modules:
        rotary = copy.deepcopy(rotary).to(device)
        rotary.__dict__.pop("forward", None)  # accelerate's, of the module that was copied
        if hasattr(rotary, "recomposition_frequencies") or hasattr(rotary, "mrope_section"):
            raise _multiple_axes(name)
        try:
            return _measure_layer(attention_module, config, rotary, layer_type, parameters, device)
        except _NotReproducedError as error:
            failures.append(f"{type(rotary).__name__}: {error}")
    raise NotImplementedError(
        f"The rotary embedding of {name} could not be reproduced ({'; '.join(failures)}). {WAY_OUT}"
    )


def refuse_unsupported_rope(config: PreTrainedConfig) -> None:
    """
    Raises at once what the config alone tells of a rotation that keys cannot be moved by.

    Raises:
        NotImplementedError: As `rotary_frequencies` would.
    """
    config = config.get_text_config(decoder=True)
    for layer_type in dict.fromkeys([None, *(getattr(config, "layer_types", None) or [])]):
        _refuse_by_name(type(config).__name__, _rope_parameters(config, layer_type) or {})


def export_frequencies(rotary: RotaryFrequencies | None) -> tuple[dict[str, Any] | None, dict[str, torch.Tensor]]:
    """Frequencies for a file: what JSON takes, and tensors by the names in `FREQUENCY_TENSORS`."""
    if rotary is None:
        return None, {}
    numbers = {
        "layout": rotary.layout,
        "original_max_position_embeddings": rotary.original_max_position_embeddings,
    }
    tensors = {name: getattr(rotary, name) for name in FREQUENCY_TENSORS}
    return numbers, {name: tensor for name, tensor in tensors.items() if tensor is not None}


def import_frequencies(numbers: dict[str, Any] | None, tensors: dict[str, torch.Tensor]) -> RotaryFrequencies | None:
    """The frequencies that `export_frequencies` gave, out of the numbers and tensors of a file."""
    if numbers is None:
        return None
    return RotaryFrequencies(**numbers | {name: tensors[name] for name in FREQUENCY_TENSORS if name in tensors})


class SharedFrequencies:
    """
    The rotary frequencies of a model's layers, found once for those that rotate alike.

    Args:
        config (`PreTrainedConfig`): Of the model.
        get_model (`Callable`, *optional*): Returns the model itself, or None if it is gone; see `rotary_frequencies`.
    """

    def __init__(
        self, config: PreTrainedConfig, get_model: Callable[[], PreTrainedModel | None] | None = None
    ) -> None:
        self._config = config
        self._get_model = get_model
        self.forget()

    def frequencies_of(self, module: nn.Module, device: torch.device) -> RotaryFrequencies | None:
        """
        The frequencies of an attention module, None if it has none; the same object for layers that have the same.
        """
        config = getattr(module, "config", self._config)  # the cache's own may be of a model that rotates otherwise
        model = None if self._get_model is None else self._get_model()
        found = rotary_frequencies(module, config, model=model, device=device)
        return None if found is None else self.shared(found)

    def shared(self, found: RotaryFrequencies) -> RotaryFrequencies:
        """The object that all layers with these frequencies use."""
        for known in self._known:
            if known.equals(found):
                return known
        self._known.append(found)
        return found

    def held_tensors(self) -> list[torch.Tensor]:
        """What it refers to."""
        tensors = [tensor for known in self._known for tensor in (known.inv_freq, known.long_inv_freq)]
        return [tensor for tensor in tensors if tensor is not None]

    def forget(self) -> None:
        """Lets go of it, for another model."""
        self._known: list[RotaryFrequencies] = []


class _NotReproducedError(NotImplementedError):
    """One rotary module does not explain what the attention module does; another of the same file may."""


def _source_modules(attention_module: nn.Module) -> list[ModuleType]:
    """The Python modules that define the class of `attention_module` and its bases, torch's apart."""
    names = dict.fromkeys(base.__module__ for base in type(attention_module).__mro__)
    return [sys.modules[name] for name in names if name.split(".")[0] not in ("torch", "builtins")]


def _mentions_rotation(names: Iterable[str]) -> bool:
    """Whether any of the names in a model file or a class speaks of rotations ("property" and "SolarOpen" do not)."""
    return any(re.search("[Rr]otary|[Rr]otate|ROTARY|(?<!p)(rope|Rope|RoPE|ROPE)", name) for name in names)


def _forward_names(module: nn.Module) -> list[str]:
    """The names of the arguments of a module's forward."""
    return list(inspect.signature(module.forward).parameters)


def _rotary_classes(sources: list[ModuleType]) -> list[type[nn.Module]]:
    """The rotary embedding classes of the model files, those of image and sound encoders last."""
    found = [
        value
        for source in sources
        for name, value in vars(source).items()
        if isinstance(value, type) and issubclass(value, nn.Module) and _mentions_rotation([name])
    ]
    return sorted(dict.fromkeys(found), key=lambda value: "Vision" in value.__name__ or "Audio" in value.__name__)


def _rotary_modules(
    attention_module: nn.Module,
    config: PreTrainedConfig,
    classes: list[type[nn.Module]],
    model: PreTrainedModel | None,
) -> list[nn.Module]:
    """
    The rotary modules that may serve `attention_module`: its own, else the nearest one of `model`, else those that the
    classes build from `config`.
    """
    own = [child for child in attention_module.children() if isinstance(child, tuple(classes))]
    if own:
        return own
    if model is not None:
        path = next(path for path, module in model.named_modules() if module is attention_module).split(".")
        for depth in range(len(path) - 1, -1, -1):
            ancestor = model.get_submodule(".".join(path[:depth]))
            near = [child for child in ancestor.children() if isinstance(child, tuple(classes))]
            if near:
                return near
        return []
    built = []
    for rotary_class in classes:
        try:
            with torch.device("cpu"):  # whatever the default is
                built.append(rotary_class(config))
        except Exception:  # a class of the same file that belongs to another config, such as the image encoder's
            continue
    if classes and not built:
        raise NotImplementedError(
            f"None of {[rotary_class.__name__ for rotary_class in classes]} could be built from "
            f"{type(config).__name__}. Build the cache from the model instead of its config, or use a cache that "
            "leaves keys at the positions the model gave them."
        )
    return built


def _rope_parameters(config: PreTrainedConfig, layer_type: str | None) -> dict[str, Any] | None:
    """`config.rope_parameters`, those of `layer_type` where they differ; `None` for a layer type set to have none."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters[layer_type] if layer_type in parameters else parameters


def _multiple_axes(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name} rotates by positions with several axes (mrope: time, height and width), which a distance in tokens "
        f"cannot move. {WAY_OUT}"
    )


def _refuse_by_name(name: str, parameters: dict[str, Any]) -> None:
    """Refuse the RoPE types that are known not to be a fixed rotation by position."""
    if "dynamic" in str(parameters.get("rope_type", "")):
        raise NotImplementedError(
            f"{name} uses dynamic NTK scaling: its inverse frequencies depend on the length of the sequence, so keys "
            "that were stored at one length cannot be moved at another. Load the model with a fixed rope_type such as "
            f"'yarn' or 'linear', or {WAY_OUT[0].lower()}{WAY_OUT[1:]}"
        )
    if any("mrope" in key for key in parameters):
        raise _multiple_axes(name)


def _measure_layer(
    attention_module: nn.Module,
    config: PreTrainedConfig,
    rotary: nn.Module | None,
    layer_type: str | None,
    parameters: dict[str, Any],
    device: torch.device,
) -> RotaryFrequencies | None:
    """Measure the frequencies of `rotary` and find how they turn the keys; `None` if the keys are not turned."""
    positions = torch.tensor([PROBE_POSITIONS], device=device)
    generator, shape = torch.Generator("cpu"), (1, len(PROBE_POSITIONS), _hidden_size(attention_module, config))
    hidden_states = torch.randn(shape, generator=generator.manual_seed(0), device="cpu")
    hidden_states = hidden_states.to(device=device, dtype=_compute_dtype(attention_module, config))

    frequencies = None if rotary is None else _measure_frequencies(rotary, config, layer_type, parameters, device)
    recorded = []
    for probe in (torch.zeros_like(positions), positions):
        embeddings = None if rotary is None else _call_rotary(rotary, hidden_states, probe, layer_type)
        recorded.append(_record_update(attention_module, hidden_states, embeddings, probe))
    # (1, kv_heads, len(PROBE_POSITIONS), head_dim)
    (unrotated, unrotated_values), (rotated, rotated_values) = recorded
    name = type(attention_module).__name__

    # A turn rounds cosine, sine, two products and a sum: within a few eps of the largest entry.
    largest = unrotated.abs().max().item()
    tolerance = 8 * torch.finfo(unrotated.dtype).eps * largest
    if not 0 < largest < float("inf"):
        raise _NotReproducedError(f"its keys are all {largest}, load the weights first")
    if not torch.allclose(unrotated_values, rotated_values, rtol=0, atol=tolerance):
        raise NotImplementedError(
            f"{name} caches something else than keys and values: compressed latents, whose rotated part is in the "
            f"place of the values (multi-head latent attention). {WAY_OUT}"
        )
    unrotated, rotated = unrotated.double(), rotated.double()
    is_unrotated = bool((rotated - unrotated).abs().max() <= tolerance)
    if frequencies is None and (not is_unrotated or _mentions_rotation(dir(type(attention_module)))):
        raise NotImplementedError(f"No rotary module was found that explains how {name} rotates its keys. {WAY_OUT}")
    if is_unrotated:
        return None
    for candidate in _arrangements(frequencies, unrotated.shape[-1]):
        angles = candidate.model_angles(positions, PROBE_POSITIONS[-1] + 1)[:, None]
        if (candidate.rotate(unrotated, angles) - rotated).abs().max() <= tolerance:
            return candidate
    raise _NotReproducedError("its angles do not turn the keys into what the attention module stores")


def _arrangements(frequencies: RotaryFrequencies, head_dim: int) -> list[RotaryFrequencies]:
    """Every way known in which models apply frequencies to a head: turning which way, paired how."""
    if frequencies.rotary_dim > head_dim:
        return []
    long_inv_freq = frequencies.long_inv_freq
    return [
        replace(
            frequencies,
            inv_freq=sign * frequencies.inv_freq,
            layout=layout,
            long_inv_freq=None if long_inv_freq is None else sign * long_inv_freq,
        )
        for sign in (1, -1)
        for layout in ("half", "interleaved")
    ]


def _hidden_size(attention_module: nn.Module, config: PreTrainedConfig) -> int:
    """The size of an attention module's input, which need not be the model's (Zamba2 doubles it)."""
    for module in attention_module.modules():
        if isinstance(in_features := getattr(module, "in_features", None), int):
            return in_features
    return config.hidden_size


def _compute_dtype(attention_module: nn.Module, config: PreTrainedConfig) -> torch.dtype:
    """The dtype of an attention module's input; quantised weights tell nothing, then the config's counts."""
    for parameter in attention_module.parameters():
        if parameter.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return parameter.dtype
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def _record_update(
    attention_module: nn.Module, hidden_states: torch.Tensor, embeddings: Any, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The keys and values `(1, kv_heads, seq, head_dim)` that `attention_module` hands to a cache for `hidden_states`
    `(1, seq, hidden_size)` at `positions` `(1, seq)`, where the rotary module's output is `embeddings`.
    """
    recorder = _Recorder()
    known = {
        "position_embeddings": embeddings,
        "position_ids": positions,
        "cache": recorder,  # from transformers 5.24 on
        "past_key_values": recorder,
        "past_key_value": recorder,
        "layer_past": recorder,
        "use_cache": True,
    }
    arguments: dict[str, Any] = {}
    for parameter in list(inspect.signature(attention_module.forward).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name in known or parameter.default is parameter.empty:
            arguments[parameter.name] = known.get(parameter.name)
    try:
        # Not `attention_module(...)`: hooks, which may count or capture calls, must not see the probe.
        attention_module.forward(hidden_states, **arguments)
    except _KeysReached:
        return recorder.recorded
    except Exception as error:
        raise _NotReproducedError(f"{type(attention_module).__name__} could not be probed: {error!r}") from error
    raise _NotReproducedError(f"{type(attention_module).__name__} hands no keys to a cache")


def _call_rotary(rotary: nn.Module, states: torch.Tensor, positions: torch.Tensor, layer_type: str | None) -> Any:
    """What the model passes on as position embeddings for tokens at `positions` `(1, seq)`."""
    if "layer_type" in _forward_names(rotary):
        return rotary(states, positions, layer_type=layer_type)
    return rotary(states, positions)


def _measure_frequencies(
    rotary: nn.Module,
    config: PreTrainedConfig,
    layer_type: str | None,
    parameters: dict[str, Any],
    device: torch.device,
) -> RotaryFrequencies:
    """
    Read the inverse frequencies of `rotary` in forwards below, just above and far above the length at which longrope
    switches, and check that they give its cosines and sines. `rotary` is a copy: the forwards may change it.
    """
    original = parameters.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
    original = original if isinstance(original, int) and original > 1 else 2048
    per_type = "layer_type" in _forward_names(rotary) and hasattr(rotary, f"{layer_type}_inv_freq")

    def measure(longest: int, known: torch.Tensor | None) -> torch.Tensor:
        powers = [2**exponent for exponent in range(longest.bit_length()) if 2**exponent < longest]
        positions = torch.tensor([[0, *powers, longest - 1]], device=device)
        states = torch.zeros(1, positions.shape[1], 1, dtype=torch.float32, device=device)
        try:
            embeddings = _call_rotary(rotary, states, positions, layer_type)
            inv_freq = getattr(rotary, f"{layer_type}_inv_freq" if per_type else "inv_freq").detach().float().clone()
        except Exception as error:
            raise _NotReproducedError(f"could not be called: {error!r}") from error
        # Phimoe's buffer follows the length although its angles do not, hence also what is known already.
        for candidate in (inv_freq, known):
            if candidate is not None and _gives_embeddings(candidate, positions, embeddings):
                return candidate
        raise _NotReproducedError(f"its cosines are not those of its frequencies in a forward of {longest} tokens")

    short = measure(original, None)
    long = measure(original + 1, short)
    if not torch.equal(measure(4 * original, long), long):
        raise NotImplementedError(
            f"The frequencies of {type(rotary).__name__} depend on the length of the sequence, so keys that were "
            f"stored at one length cannot be moved at another. {WAY_OUT}"
        )
    if torch.equal(short, long):
        return RotaryFrequencies(inv_freq=short)
    return RotaryFrequencies(inv_freq=short, long_inv_freq=long, original_max_position_embeddings=original)


def _gives_embeddings(inv_freq: torch.Tensor, positions: torch.Tensor, embeddings: Any) -> bool:
    """
    Whether float32 angles of `inv_freq` `(rotary_dim / 2,)` at `positions` `(1, seq)`, the first of them zero, give
    the rotary module's output: cosines and sines `(1, seq, rotary_dim or rotary_dim / 2)`, or complex numbers.
    """
    if isinstance(embeddings, torch.Tensor) and embeddings.is_complex():
        embeddings = (embeddings.real, embeddings.imag)
    angles = positions[..., None].float() * inv_freq
    cosine, sine = (part.float() for part in embeddings)
    # The cosine of angle zero is the factor (yarn, longrope) that multiplies both.
    scaling = cosine[:, :1, :1]
    arranged = [angles, torch.cat([angles, angles], dim=-1), angles.repeat_interleave(2, dim=-1)]
    return any(
        candidate.shape == cosine.shape
        and torch.allclose(candidate.cos() * scaling, cosine, rtol=0, atol=1e-5)
        and torch.allclose(candidate.sin() * scaling, sine, rtol=0, atol=1e-5)
        for candidate in arranged
    )
