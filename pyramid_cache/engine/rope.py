"""
How the layers of a model rotate their keys, found from what the model hands to each of them.

Each layer is probed while its attention runs for the first time, and again once a tensor that the answer depends on
has changed. A table of model types would have to be kept up to date, and would not see frequencies that
`model.to(torch.bfloat16)` has rounded. Nothing is read from classes:

1. The frames of `Module.__call__` hold the modules that are running and what each was handed.
2. The rotary module that gives the same cosines and sines for the positions of this forward is the one in use. Its
   angles tell which of its buffers holds the frequencies, and at which length longrope changes them.
3. The layer runs up to its cache update, for one token at several positions. The keys tell whether they turn, which
   dimensions and which way. What does not fit is refused.
"""

import contextlib
import copy
import inspect
import itertools
import math
import traceback
from bisect import bisect
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdRef
from transformers import Cache, DynamicCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pyramid_cache.engine.architectures import CACHE_ARGUMENT, rope_refusal
from pyramid_cache.engine.rotation import RotaryFrequencies, export_frequencies


# Zero, where keys are as they were, and primes near the powers of eight: exact in float32, and slow pairs turn too.
PROBE_POSITIONS = (0, 1, 7, 61, 509, 4093, 32749, 262139, 2097143)
# What a running module is, and what it was handed, by name.
Call = tuple[Any, dict[str, Any]]


@dataclass
class Finding:
    """How an attention module rotates keys, and what that depends on."""

    frequencies: RotaryFrequencies | None  # None if it does not rotate them
    owner: ref[nn.Module] | None = None  # has the rotary module below it
    name: str = ""  # the rotary module's, there
    dependencies: tuple = ()  # `dependencies_now` when it was found

    def dependencies_now(self, module: nn.Module) -> tuple:
        """The class, weights and rotary buffers of `module`; an object, equal to no other, for what is not known."""
        try:
            rotary = self.owner().get_submodule(self.name)  # type: ignore[union-attr, misc]
        except (AttributeError, TypeError):  # the rotary module is gone
            return (object(),)
        tensors = (*module.parameters(), *module.buffers(), *rotary.buffers())
        # Tensors of inference mode do not count their changes, nor does a change of `.data`.
        versions = [object() if each.is_inference() else each._version for each in tensors]
        values = [each.tolist() for each in rotary.buffers() if each.dim() == 1 and not each.is_meta]
        return type(module), versions, values, [(WeakIdRef(each), each.dtype, each.device) for each in tensors]


# What was found last, for as long as the module lives. Caches are also given recorded keys while none is running. It
# goes unnoticed if a second model runs the same module with cosines from a rotary module of its own.
findings: WeakKeyDictionary[nn.Module, Finding] = WeakKeyDictionary()


class SharedFrequencies:
    """The rotary frequencies of a model's layers: one object for all that rotate alike."""

    def __init__(self) -> None:
        self.forget()

    @torch.compiler.disable
    @torch.no_grad()
    def frequencies_of(self, module: nn.Module, device: torch.device) -> RotaryFrequencies | None:
        """
        How an attention module that runs on `device` rotates its keys, or None if it does not. Of a module that is not
        running, what was found last. Raises NotImplementedError where nothing was found.
        """
        known = findings.get(module)
        if known is None or known.dependencies != known.dependencies_now(module):
            if calls := running_calls(module):
                findings.pop(module, None)
                known = findings[module] = _probe(calls, device)
            elif known is None:
                way_out = "Compile the model after a forward with this cache."
                raise rope_refusal(module, f"what is found while it runs. {way_out}")
        return None if known.frequencies is None else self.shared(known.frequencies)

    def shared(self, found: RotaryFrequencies) -> RotaryFrequencies:
        """The copy that all layers of the cache with these frequencies use. It goes with the cache."""
        if found.content not in self._known:
            self._known[found.content] = copy.deepcopy(found)
        return self._known[found.content]

    def held_tensors(self) -> list[torch.Tensor]:
        """What it refers to."""
        return [tensor for known in self._known.values() for tensor in known.held_tensors()]

    def forget(self) -> None:
        """Lets go of it, for another model."""
        self._known: dict[tuple, RotaryFrequencies] = {}


def running_calls(module: nn.Module) -> list[Call]:
    """The modules whose forward is running, from `module` outwards; none if that is not."""
    calls: list[Call] = []
    for frame, _ in traceback.walk_stack(None):
        # Locals that are read live until the frame ends; those of `Module.__call__` do so anyway.
        if frame.f_code.co_name == "_call_impl" and (calls or frame.f_locals["self"] is module):
            running, args, kwargs = (frame.f_locals[name] for name in ("self", "args", "kwargs"))
            names = inspect.signature(running.forward).parameters
            calls.append((running, dict(zip(names, args, strict=False)) | kwargs))
    return calls


def check_one_axis(module: nn.Module) -> None:
    """Raises NotImplementedError if a running attention module is given an image by position ids of several axes."""
    for _, given in running_calls(module):
        positions = given.get("position_ids")
        if isinstance(positions, torch.Tensor) and positions.dim() == 3 and (positions != positions[:1]).any():
            raise rope_refusal(module, "positions with several axes (mrope), which the tokens of an image have.")


class _KeysReached(Exception):
    """Ends an attention forward where it hands over its keys: the rest of it is not needed."""


class _Recorder(DynamicCache):
    """A cache that only ends the forward."""

    is_updated: dict[int, bool] = {}  # decoders beside an encoder look for these two
    self_attention_cache = property(lambda self: self)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise _KeysReached(*args)


class _Rotary:
    """A copy of the rotary module that `owner` has under a name. Calls of it change nothing of the model."""

    def __init__(self, owner: nn.Module, name: str, attention_module: Any) -> None:
        self.place = ref(owner), name
        module = owner.get_submodule(name)
        self.module, self.settings = copy.copy(module), {}
        self.module._buffers = {name: copy.deepcopy(buffer) for name, buffer in module._buffers.items()}
        if "layer_type" in inspect.signature(type(module).forward).parameters:
            self.settings["layer_type"] = attention_module.config.layer_types[attention_module.layer_idx]

    def __call__(self, positions: torch.Tensor, dtype: torch.dtype = torch.float32) -> Any:
        """Cosines and sines `(rows, tokens, width)`, or complex numbers, as the model hands them to its layers."""
        states = torch.zeros(1, dtype=dtype, device=positions.device)
        if hasattr(self.module, "mrope_section"):  # time, height and width, which are equal for text
            positions = positions.expand(3, *positions.shape)
        return type(self.module).forward(self.module, states, positions, **self.settings)

    def inv_freq(self, longest: int, device: torch.device) -> torch.Tensor:
        """Its buffer `(rotary_dim / 2,)`, in float32, whose angles it gives in a forward of `longest` tokens."""
        parts = tree_leaves(self(torch.tensor([[1, longest - 1]], device=device)))
        turned = (parts[0] if len(parts) == 1 else torch.complex(*parts))[0, 0].angle().sort().values
        for buffer in (each.to(device, torch.float32) for each in self.module.buffers() if each.dim() == 1):
            expected = buffer.repeat(len(turned) // len(buffer)).sort().values
            if expected.shape == turned.shape and torch.allclose(expected, turned, rtol=0, atol=1e-6):
                return buffer.clone()
        raise rope_refusal(self.module, "angles that could not be reproduced: none of its buffers gives them.")

    def frequencies(self, device: torch.device) -> RotaryFrequencies:
        """Those of forwards below and beyond the length at which longrope switches."""
        short, long, longer = (self.inv_freq(longest, device) for longest in (2, 2**21, 2**22))
        if not torch.equal(long, longer):
            raise rope_refusal(self.module, "frequencies which depend on the length of the sequence.")
        if torch.equal(short, long):
            return RotaryFrequencies(short)
        lengths = range(2**21)
        switch = bisect(lengths, False, lo=2, key=lambda length: torch.equal(self.inv_freq(length, device), long))
        return RotaryFrequencies(short, "half", long, switch - 1)


def _rotaries(parent: nn.Module, attention_module: nn.Module) -> list[_Rotary]:
    found = [name for name, each in parent.named_modules() if any("inv_freq" in buffer for buffer in each._buffers)]
    return [_Rotary(parent, name, attention_module) for name in found]


def _maker(parts: list[torch.Tensor], calls: list[Call]) -> _Rotary:
    """The model's module that made tensors `(rows, tokens, width)` from the positions of this forward."""
    (module, given), (model, _), shape = calls[0], calls[-1], parts[0].shape[:2]
    layer_idx = getattr(module, "layer_idx", None) or 0
    known = [each["position_ids"] for _, each in calls if getattr(each.get("position_ids"), "shape", 0) == shape]
    if not known:  # a model that passes none on counts from what the cache had seen, before it got these tokens
        seen = [value.get_seq_length(layer_idx) for value in given.values() if isinstance(value, Cache)]
        columns = torch.arange(shape[1], device="cpu").expand(shape)
        known = [columns + start for n in seen for start in (n, n - shape[1])]
    makers, rotaries = {}, _rotaries(model, module)
    if not rotaries:  # a layer that is called on its own has the usual one, or is refused
        with contextlib.suppress(Exception), torch.device("cpu"):
            rotaries = [_Rotary(LlamaRotaryEmbedding(module.config), "", module)]
    for rotary, ids in itertools.product(rotaries, known):
        with contextlib.suppress(Exception):  # a module of an image encoder takes something else
            torch.testing.assert_close(tree_leaves(rotary(ids.to(parts[0].device), parts[0].dtype)), parts)
            makers[tuple(rotary.inv_freq(2, ids.device).tolist())] = rotary
    if len(makers) != 1:
        reason = "angles that could not be reproduced: no single module makes them from the positions of tokens."
        raise rope_refusal(module, f"{reason} Start with several tokens, without images.")
    return makers.popitem()[1]


def _probe(calls: list[Call], device: torch.device) -> Finding:
    """How the innermost of running modules rotates keys."""
    module, given = calls[0][0], dict(calls[0][1])
    hidden_states = next(iter(inspect.signature(module.forward).parameters))  # a name
    positions = torch.tensor([PROBE_POSITIONS], device=device)
    token = torch.arange(given[hidden_states].shape[-1], device=device).sin().to(given[hidden_states].dtype)
    states = token.expand(1, len(PROBE_POSITIONS), -1)
    replaced = {hidden_states: states, "position_ids": positions, "attention_mask": None}
    rotary = next(iter(_rotaries(module, module)), None)
    for name, value in given.items():
        parts = list(value) if isinstance(value, tuple) else [value]
        if isinstance(value, Cache) or (name == CACHE_ARGUMENT and value is not None):  # a paged one is no `Cache`
            given[name] = _Recorder()
        elif name in replaced:
            given[name] = None if value is None else replaced[name]
        elif isinstance(parts[0], torch.Tensor) and (parts[0].is_floating_point() or parts[0].is_complex()):
            rotary = _maker(parts, calls)
            given[name] = rotary(positions, parts[0].dtype)
    try:
        module.forward(**given)  # not `module(...)`: hooks, which may count or capture calls, must not see the probe
        raise NotImplementedError("it hands no keys to a cache")
    except _KeysReached as reached:
        keys, values = reached.args[:2]  # (1, kv_heads, positions, head_dim)
    except Exception as error:
        raise rope_refusal(module, f"angles that could not be reproduced: {error!r}.") from error

    # The projections sum in float32, in an order that may differ from row to row. A turn rounds cosine, sine (float32
    # at most), two products and a sum. Each is within a few eps of the largest entry.
    eps = torch.finfo(torch.float32).eps
    largest, largest_value = keys.abs().max().item(), values.abs().max().item()
    share = 8 * max(torch.finfo(keys.dtype).eps, eps) + eps * math.sqrt(states.shape[-1])
    tolerance = share * largest
    if not 0 < largest < float("inf"):
        raise rope_refusal(module, f"what is unknown: they are all {largest}, load the weights first.")
    if (values - values[:, :, :1]).abs().max() > share * largest_value:
        raise rope_refusal(module, "what is unknown: it caches latents (multi-head latent attention).")
    # Without a rotary module, the answer depends on the attention module alone.
    finding = Finding(None, *((ref(module), "") if rotary is None else rotary.place))
    finding.dependencies = finding.dependencies_now(module)
    still = keys[:, :, :1].double().expand(keys.shape)
    if (keys - still).abs().max() <= tolerance:
        return finding
    if rotary is None:
        raise rope_refusal(module, "angles that could not be reproduced: none of its modules gives them.")
    measured = rotary.frequencies(device)
    layouts: list[Literal["half", "interleaved"]] = ["half", "interleaved"]
    for sign, layout in itertools.product((1, -1), layouts):
        turned: dict[str, Any] = {name: sign * tensor for name, tensor in export_frequencies(measured)[1].items()}
        found = replace(measured, layout=layout, **turned)
        angles = found.model_angles(positions, PROBE_POSITIONS[-1] + 1)[:, None]
        if found.rotary_dim <= keys.shape[-1] and (found.rotate(still, angles) - keys).abs().max() <= tolerance:
            return replace(finding, frequencies=found)
    raise rope_refusal(module, "angles that could not be reproduced.")
