"""
Attention matching of Zweiger et al., 2026 (https://arxiv.org/abs/2602.16284, Section 3): a compacted cache.

A head keeps the keys that a policy chooses, and makes them answer for all. Reference queries stand for those to come.
First each kept key gets a weight, by non-negative least squares, so that the kept keys get the mass of attention that
all keys had; its logarithm is the bias of the slot. Then the values become those with which the reference queries get
their old outputs, by ridge regression.

Departures from the paper: keys are chosen by KVzip+, among all heads of all layers. The regression pulls towards the
old values, and not towards zero, so that a slot that no reference query sees stays as it is. A later turn is matched
on its own: its tokens stand for its own tokens alone, and earlier slots stay as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Unpack

from pyramid_cache.caches.kvzip import KVzipPolicy, ReplayScores, give_scores
from pyramid_cache.engine.budget import read_count
from pyramid_cache.engine.compaction import Compactor
from pyramid_cache.engine.policy import LayerView, Policy, PromptView
from pyramid_cache.engine.policy_cache import EvictionOptions
from pyramid_cache.engine.protection import is_protected
from pyramid_cache.engine.replay import Chunk, ReplayingCache, ReplayTexts
from pyramid_cache.ops.reference import grouped_logits, softmax_of_logits


REFERENCES = ("replay", "prompt")
NUM_STEPS = 200  # of the non-negative least squares
MIN_WEIGHT = 1e-4
# Tokens of a later turn that is matched: fewer give too few reference queries.
MIN_TURN = 128
RIDGE, MIN_RIDGE = 3e-2, 1e-6
# Elements of the probabilities of reference queries that are held at once: 128 MiB in float32.
PROBABILITY_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class References:
    """
    Queries that stand for those to come, of one turn.

    Attributes:
        query (`torch.Tensor`): `(batch, heads, queries, head_dim)`.
        positions (`torch.Tensor`): `(batch, queries)` int32. A query sees tokens up to its own position; -1 is no
            query.
        starts (`torch.Tensor`): `(batch,)`, where the turn begins.
        scaling, softcap, sink_logits: See `PromptView`.
    """

    query: torch.Tensor
    positions: torch.Tensor
    starts: torch.Tensor
    scaling: float
    softcap: float | None
    sink_logits: torch.Tensor | None

    @staticmethod
    def of(
        view: PromptView, starts: torch.Tensor, num_queries: torch.Tensor, most: torch.Tensor, begins: bool
    ) -> "References":
        """
        Queries of a forward pass, evenly spaced.

        Args:
            num_queries (`torch.Tensor`): `(batch,)`, how many each row has.
            most (`torch.Tensor`): `(batch,)`, how many are taken of each row at most.
            begins (`bool`): Whether they are the first columns of the forward pass, or the last.
        """
        _, heads, num_columns, head_dim = view.query.shape
        taken = num_queries.minimum(most)
        places = torch.arange(int(taken.max()), device=view.query.device)
        # The last query is among them.
        columns = num_queries[:, None] - 1 - places * num_queries[:, None] // taken[:, None].clamp(min=1)
        is_query = places < taken[:, None]
        if not begins:
            columns = columns + (num_columns - num_queries)[:, None]
        columns = columns.clamp(min=0)
        index = columns[:, None, :, None].expand(-1, heads, -1, head_dim)
        positions = view.query_positions[:, 0].gather(1, columns).masked_fill(~is_query, -1)
        return References(view.query.gather(2, index), positions, starts, view.scaling, view.softcap, view.sink_logits)

    @staticmethod
    def joined(parts: Sequence["References"]) -> "References":
        """All of them."""
        query, positions = (
            torch.cat([getattr(part, name) for part in parts], dim=dim)
            for name, dim in (("query", 2), ("positions", 1))
        )
        return replace(parts[0], query=query, positions=positions)


def is_matched(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Whether turns of rows `(batch,)` are matched: first ones, and later ones that are long enough."""
    return (starts == 0) | (lengths >= MIN_TURN)


class Matching(Compactor):
    """Attention matching of one layer."""

    merges_generated = False

    def __init__(self, num_references: int, observes: bool) -> None:
        self.num_references, self.observes = num_references, observes
        self.references: References | None = None

    def forget(self) -> None:
        self.references = None

    def observe(self, prompt: PromptView) -> None:
        if self.observes:
            group = prompt.query.shape[1] // prompt.key.shape[1]
            num_queries = (prompt.query_positions[:, 0] >= 0).sum(dim=-1)
            starts = prompt.length[:, 0, 0] - num_queries
            most = is_matched(starts, num_queries) * max(self.num_references // group, 1)
            self.references = References.of(prompt, starts, num_queries, most, begins=False)

    def compact(self, view: LayerView, is_kept: torch.Tensor, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
        references = self.references
        if references is None or not references.positions.shape[1]:  # generated tokens go, or those of short turns
            return {}
        is_fixed = view.positions < references.starts[:, None, None]
        if view.state.protected is not None:
            is_fixed = is_fixed | is_protected(view.positions, view.state.protected)
        found = match_attention(references, view.key, view.value, view.positions, is_kept, is_fixed, bias)
        if view.value.requires_grad:  # what is added is a constant to autograd
            found["values"] = view.value + (found["values"] - view.value).detach()
        return found


@torch.no_grad()
def match_attention(
    references: References,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    is_kept: torch.Tensor,
    is_fixed: torch.Tensor,
    bias: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """
    Biases and values with which the kept tokens give what all tokens gave.

    Args:
        key, value (`torch.Tensor`): `(batch, kv_heads, tokens, head_dim)`, of all tokens.
        positions (`torch.Tensor`): `(batch, kv_heads or 1, tokens)` int32, -1 for what is no token.
        is_kept, is_fixed (`torch.Tensor`): `(batch, kv_heads or 1, tokens)` bool. Fixed tokens are not changed, and no
            others stand for them: those of earlier turns, and protected ones.
        bias (`torch.Tensor`, *optional*): `(batch, kv_heads, tokens)` float32, of all tokens.

    Returns:
        `dict[str, torch.Tensor]`: "values" and "bias" of all tokens, of which those that are not kept are unchanged.
    """
    batch, kv_heads, num_tokens, _ = key.shape
    stays, is_fixed, positions = (each.expand(batch, kv_heads, -1) for each in (is_kept, is_fixed, positions))
    is_kept = stays & ~is_fixed
    old_bias = torch.zeros(key.shape[:3], dtype=torch.float32, device=key.device) if bias is None else bias
    values, biases = value.clone(), old_bias.clone()
    # Heads that keep equal numbers are matched together, as far as their probabilities fit.
    by_count: dict[int, list[int]] = {}
    for segment, count in enumerate(is_kept.sum(dim=-1).flatten().tolist()):
        by_count.setdefault(count, []).append(segment)
    num_rows = references.query.shape[1] // kv_heads * references.query.shape[2]
    most = max(PROBABILITY_ELEMENTS // (num_rows * num_tokens), 1)
    for count, segments in by_count.items():
        for start in range(0, len(segments) if 0 < count < num_tokens else 0, most):
            index = torch.tensor(segments[start : start + most], device=key.device)
            rows, heads = index // kv_heads, index % kv_heads
            kept = is_kept[rows, heads].nonzero()[:, 1].view(len(index), count)
            given = (each[rows, heads] for each in (key, positions, old_bias))
            probabilities, others = probabilities_of(references, rows, heads, kv_heads, *given)
            # How strongly attention differs between slots, those of attention sinks included.
            strength = probabilities.square().sum(dim=1).masked_fill(~stays[rows, heads], 0).sum(dim=-1)
            strength = strength / stays[rows, heads].sum(dim=-1)
            is_other = is_fixed[rows, heads][:, None]
            others = others + (probabilities * is_other).sum(dim=-1, keepdim=True)
            probabilities = probabilities.masked_fill(is_other, 0)
            places = rows[:, None], heads[:, None], kept
            values[places], weights = match_segments(probabilities, others, kept, value[rows, heads], strength)
            biases[places] += weights.log()
    return {"values": values, "bias": biases}


def match_segments(
    probabilities: torch.Tensor,
    others: torch.Tensor,
    kept: torch.Tensor,
    value: torch.Tensor,
    strength: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    New values `(segments, kept, value_dim)` and weights `(segments, kept)` float32 of kept tokens.

    Args:
        probabilities (`torch.Tensor`): `(segments, rows, tokens)` float32, of the reference queries.
        others (`torch.Tensor`): `(segments, rows, 1)`, the attention that goes elsewhere.
        kept (`torch.Tensor`): `(segments, kept)`, the indices of the tokens that stay.
        value (`torch.Tensor`): `(segments, tokens, value_dim)`.
        strength (`torch.Tensor`): `(segments,)`, see `ridge_regression`.
    """
    wanted, totals = probabilities @ value.float(), probabilities.sum(dim=-1)
    attended = probabilities.gather(-1, kept[:, None].expand(-1, probabilities.shape[1], -1))
    weights = nonnegative_least_squares(attended, totals)
    attended = attended * weights[:, None]
    masses = attended.sum(dim=-1, keepdim=True) + others
    attended = attended / masses.clamp(min=torch.finfo(masses.dtype).tiny)
    old = value.gather(1, kept[..., None].expand(-1, -1, value.shape[-1]))
    return ridge_regression(attended, wanted, old.float(), strength).to(value.dtype), weights


def probabilities_of(
    references: References,
    rows: torch.Tensor,
    heads: torch.Tensor,
    kv_heads: int,
    key: torch.Tensor,
    positions: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The attention `(segments, group * queries, tokens)` float32 of reference queries to the keys of segments: KV heads
    of `rows` and `heads`, with keys `(segments, tokens, head_dim)`, positions and bias `(segments, tokens)`. Second
    comes what learned sinks take of it, `(segments, group * queries, 1)`.
    """
    query = references.query.unflatten(1, (kv_heads, -1))[rows, heads].float()  # (segments, group, queries, head_dim)
    logits = grouped_logits(query, key[:, None].float(), references.scaling, references.softcap)
    is_visible = (positions >= 0)[:, None] & (positions[:, None] <= references.positions[rows, :, None])
    logits = logits + bias[:, None, None, None]
    if (sinks := references.sink_logits) is not None:
        column = sinks.float().view(kv_heads, -1)[heads][:, None, :, None, None]
        logits = torch.cat([logits, column.expand(-1, -1, -1, logits.shape[3], -1)], dim=-1)
        is_visible = functional.pad(is_visible, (0, 1), value=True)
    probabilities = softmax_of_logits(logits, is_visible[:, None, None]).flatten(1, 3)
    return probabilities[..., : key.shape[1]], probabilities[..., key.shape[1] :].sum(dim=-1, keepdim=True)


def nonnegative_least_squares(attended: torch.Tensor, totals: torch.Tensor) -> torch.Tensor:
    """
    The weights `w >= MIN_WEIGHT` that minimise `‖A w - r‖²`, by accelerated projected gradient from 1 on.

    Args:
        attended (`torch.Tensor`): `A`, `(..., rows, slots)` float32, not negative.
        totals (`torch.Tensor`): `r`, `(..., rows)`.

    Returns:
        `torch.Tensor`: `(..., slots)`; 1 for a slot whose column is 0.
    """
    gram = attended.mT @ attended
    wanted = (attended.mT @ totals[..., None]).squeeze(-1)
    # Not less than the largest eigenvalue.
    steps = 1 / gram.sum(dim=-1).amax(dim=-1, keepdim=True).clamp(min=torch.finfo(gram.dtype).tiny)
    weights = ahead = torch.ones_like(wanted)
    momentum = 1.0
    for _ in range(NUM_STEPS):
        gradient = (gram @ ahead[..., None]).squeeze(-1) - wanted
        found = (ahead - steps * gradient).clamp(min=MIN_WEIGHT)
        later = (1 + (1 + 4 * momentum * momentum) ** 0.5) / 2
        ahead = found + (momentum - 1) / later * (found - weights)
        weights, momentum = found, later
    return weights


def ridge_regression(
    attended: torch.Tensor, wanted: torch.Tensor, old: torch.Tensor, strength: torch.Tensor
) -> torch.Tensor:
    """
    The values `V` that minimise `‖A V - Y‖² + λ ‖V - V₀‖²`, where λ is `RIDGE` times the `strength`, and `MIN_RIDGE`
    more.

    Args:
        attended (`torch.Tensor`): `A`, `(..., rows, slots)` float32.
        wanted (`torch.Tensor`): `Y`, `(..., rows, value_dim)`.
        old (`torch.Tensor`): `V₀`, `(..., slots, value_dim)`.
        strength (`torch.Tensor`): `(...)`, the mean over slots of the sums of the squared probabilities.
    """
    gram = attended.mT @ attended
    gram.diagonal(dim1=-2, dim2=-1).add_((RIDGE * strength + MIN_RIDGE)[..., None])
    missing = attended.mT @ (wanted - attended @ old)
    return old + torch.linalg.solve(gram, missing)


class Watcher:
    """
    The queries of a replay, and its scores if a policy asks for them.

    Attributes:
        references (`list[References]`): Of each layer so far.
    """

    def __init__(self, chunk: Chunk, num_references: int, scores: ReplayScores | None) -> None:
        self.chunk, self.num_references, self.scores = chunk, num_references, scores
        self.references: list[References] = []

    def observe(self, view: PromptView) -> None:
        if self.scores is not None:
            self.scores.observe(view)
        if not self.num_references:  # they come from the prompt
            return
        group = view.query.shape[1] // view.key.shape[1]
        chunk, device = self.chunk, view.query.device
        # Each chunk gives its part.
        shares = self.num_references // group * chunk.lengths // chunk.turn_lengths.clamp(min=1)
        most = is_matched(chunk.turn_starts, chunk.turn_lengths) * shares.clamp(min=1)
        starts, num_queries, most = (each.to(device) for each in (chunk.turn_starts, chunk.num_queries, most))
        self.references.append(References.of(view, starts, num_queries, most, begins=True))


class AttentionMatchingCache(ReplayingCache):
    """
    Keeps few tokens, and lets them answer for all (attention matching, https://arxiv.org/abs/2602.16284): each slot
    has a bias that is added to its logits, and values that give reference queries the outputs they had.

    Like `KVzipCache`, it reads each prompt twice. Then it solves two least-squares problems for each KV head, which
    takes time that grows with the prompt and with the square of the budget. Generated tokens are added as they are. A
    layer holds `budget` tokens per head on average over all layers, 4 bytes for the bias of each, and up to
    `eviction_interval` more tokens. See `KVzipCache` and `PolicyCache` for the errors and the other arguments.

    Args:
        model (`PreTrainedModel`): The model.
        budget (`float`, `int` or `str`, defaults to 0.1): See `PolicyCache`.
        policy (`Policy`, *optional*): Chooses the tokens that stay. By default KVzip+ does. A cache with a policy of
            yours cannot be saved.
        reference (`str`, defaults to "replay"): Where the reference queries come from: those of the replay, or of the
            "prompt" itself, which is not read twice then if a policy is given.
        num_references (`int`, defaults to 2048): How many queries of each KV head are reference at most, those of all
            query heads that share it; each of these has one. Fewer take less time and memory.
        tokenizer, texts, chunk_size: See `KVzipCache`.

    Raises:
        ValueError: For an unknown reference, or a policy that moves keys.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import AttentionMatchingCache, ReplayTexts
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> cache = AttentionMatchingCache(model, budget=8, texts=ReplayTexts((), (), ()))
    >>> output = model(torch.arange(40)[None], past_key_values=cache)
    >>> sum(cache.num_kept_tokens()) <= 2 * 8
    True

    ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        budget: float | int | str = 0.1,
        *,
        policy: Policy | None = None,
        reference: str = "replay",
        num_references: int = 2048,
        tokenizer: PreTrainedTokenizerBase | None = None,
        texts: ReplayTexts | Sequence[Sequence[int]] | None = None,
        chunk_size: int = 2048,
        **options: Unpack[EvictionOptions],
    ) -> None:
        if reference not in REFERENCES:
            raise ValueError(f"`reference={reference!r}` is unknown: choose one of {REFERENCES}.")
        if isinstance(policy, Policy) and policy.repositions:
            raise ValueError(
                f"`policy={policy!r}` moves keys, to which reference queries would attend in another place. Use one "
                "that leaves them, such as SnapKVPolicy."
            )
        self.reference, self.num_references = reference, read_count("num_references", num_references, least=1)
        self.has_scores = policy is None or getattr(policy, "needs_replay", False)
        self.waits = self.has_scores or reference == "replay"
        super().__init__(
            model,
            budget,
            KVzipPolicy() if policy is None else policy,
            tokenizer,
            texts,
            chunk_size,
            compactor=lambda: Matching(self.num_references, reference == "prompt"),
            **options,
        )
        if policy is None:
            given = {"reference": reference, "num_references": self.num_references}
            self.settings = {name: value for name, value in self.settings.items() if name != "num_recent"} | given
        else:
            self.settings = None

    def watch(self, chunk: Chunk) -> Watcher:
        most = self.num_references if self.reference == "replay" else 0
        return Watcher(chunk, most, ReplayScores(chunk, is_weighed=True) if self.has_scores else None)

    def take_in(self, watchers: list[Watcher], starts: torch.Tensor) -> None:
        if self.has_scores:
            give_scores(self.compressed_layers, [watcher.scores for watcher in watchers], starts)
        if self.reference == "replay":
            for depth, layer in enumerate(self.compressed_layers):
                layer.compactor.references = References.joined([watcher.references[depth] for watcher in watchers])
