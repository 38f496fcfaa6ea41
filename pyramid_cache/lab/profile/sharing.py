"""
Which layers of a model can use the keys and values of others (KVSharer, https://arxiv.org/abs/2410.18517, Section 3).

The mean caches of short texts tell how far any two layers are from each other. Pairs of layers are tried in turn, the
farthest first: the later layer uses the cache of the earlier one if the last hidden states of the texts stay similar.

Departure from the authors' code, whose means leave out texts of other lengths than the first: all texts are equally
long.
"""

import itertools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoTokenizer, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from pyramid_cache.caches.kv_sharer import KVSharerCache
from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.lab.novel import read_text
from pyramid_cache.lab.profile.activations import cut_texts


NUM_TEXTS, NUM_TOKENS = 30, 64
LEAST_SIMILARITY = 0.5


@dataclass(frozen=True)
class SharedLayer:
    """A layer that uses the cache of another one."""

    layer: int
    uses: int
    distance: float  # of the pair that was tried
    similarity: float  # of the last hidden states, with this pair and those before it


def read_through(model: PreTrainedModel, token_ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """The last hidden states `(texts, tokens, hidden_size)` of texts `(texts, tokens)`."""
    arguments = {CACHE_ARGUMENT: cache, "use_cache": True}
    return model.get_decoder()(input_ids=token_ids.to(model.device), **arguments).last_hidden_state


def mean_caches(cache: DynamicCache) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """By layer of full attention, the means of keys and of values over all rows, `(kv_heads, tokens, head_dim)`."""
    layers = {index: layer for index, layer in enumerate(cache.layers) if type(layer) is DynamicLayer}
    return {
        index: (layer.keys.float().mean(dim=0), layer.values.float().mean(dim=0)) for index, layer in layers.items()
    }


def pair_distances(means: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> dict[tuple[int, int], float]:
    """
    By layers (later, earlier), the Euclidean distance of their keys, the mean over heads and tokens, and that of their
    values; the mean of both. Pairs of different shapes are left out. The farthest come first.
    """
    distances = {}
    for earlier, later in itertools.combinations(sorted(means), 2):
        pairs = list(zip(means[later], means[earlier], strict=True))
        if all(one.shape == other.shape for one, other in pairs):
            parts = [(one.cpu() - other.cpu()).norm(dim=-1).mean().item() for one, other in pairs]
            distances[later, earlier] = sum(parts) / 2
    return dict(sorted(distances.items(), key=lambda item: -item[1]))


def with_pair(sharing: Mapping[int, int], later: int, earlier: int) -> dict[int, int]:
    """The map with one more layer, and without chains: layers that used `later` use what that uses."""
    target = sharing.get(earlier, earlier)
    return {layer: target if lender == later else lender for layer, lender in sharing.items()} | {later: target}


@torch.no_grad()
def find_sharing(
    model: PreTrainedModel,
    token_ids: torch.Tensor,
    num_shared: int,
    report: Callable[[str, int, int], None] = lambda text, done, total: None,
    least_similarity: float = LEAST_SIMILARITY,
) -> list[SharedLayer]:
    """
    The layers that use the cache of another one, in the order in which they were found; fewer than `num_shared` if
    the texts allow no more.

    Args:
        token_ids (`torch.Tensor`): `(texts, tokens)`.
        report (`Callable`): Is told what is done, how many layers were found, and how many are sought.
        least_similarity (`float`): What the cosine of last hidden states must exceed, the mean over texts.
    """
    cache = DynamicCache(config=model.config)
    wanted = read_through(model, token_ids, cache).flatten(1).float()
    distances = pair_distances(mean_caches(cache))
    sharing: dict[int, int] = {}
    measured: dict[int, tuple[float, float]] = {}
    for (later, earlier), distance in distances.items():
        if len(sharing) == num_shared:
            break
        if later in sharing:
            continue
        report("Trying pairs of layers", len(sharing), num_shared)
        tried = with_pair(sharing, later, earlier)
        found = read_through(model, token_ids, KVSharerCache(model.config, tried)).flatten(1).float()
        similarity = functional.cosine_similarity(found, wanted, dim=-1).mean().item()
        if similarity > least_similarity:
            sharing, measured[later] = tried, (distance, similarity)
    return [SharedLayer(layer, sharing[layer], *numbers) for layer, numbers in measured.items()]


_found: "weakref.WeakKeyDictionary[PreTrainedModel, dict[int, dict[int, int]]]" = weakref.WeakKeyDictionary()


def sharing_of(model: PreTrainedModel, num_shared: int, has_tokenizer: bool) -> dict[int, int]:
    """
    What `pyramid-cache profile --sharing` finds for a model, which is searched once: the layers that use the cache of
    another one, at most `num_shared`. Models without a tokenizer read random tokens.
    """
    known = _found.setdefault(model, {})
    if num_shared not in known:
        if has_tokenizer:
            tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
            texts = cut_texts(tokenizer, read_text(None), NUM_TOKENS, NUM_TEXTS)
        else:
            num_ids: Any = model.get_input_embeddings().num_embeddings
            texts = [torch.randint(num_ids, (NUM_TEXTS, NUM_TOKENS), generator=torch.Generator().manual_seed(0))]
        found = find_sharing(model, torch.cat(texts), num_shared)
        known[num_shared] = {layer.layer: layer.uses for layer in found}
    return known[num_shared]


def as_rows(layers: list[SharedLayer]) -> list[dict[str, Any]]:
    """As a profile has them."""
    return [asdict(layer) for layer in layers]
