"""
KVzip and KVzip+ of Kim et al., 2025 (https://arxiv.org/abs/2505.23416).

What a model needs to repeat a context, it needs to answer any question about it. So once a context has been read, the
model reads it again behind the instruction to repeat it, in chunks. A key's score is the highest probability with
which a query of this replay attends to it (paper, Section 3). The question is not needed. KVzip+ weighs each
probability by the norm of what it adds to the hidden state, over the norm of that state. The tokens of all heads of
all layers compete. The replay costs about as much as reading the context, and leaves no keys.

Departures from the authors' code: evicted tokens are freed, not masked. Rows of a batch are replayed together, each
with its own chunks. Of generated tokens, which nothing replays, the latest stay, and older ones are the first to go.
"""

import copy
import dataclasses
import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from typing_extensions import Unpack

from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.engine.attention import without_collectors
from pyramid_cache.engine.budget import read_count
from pyramid_cache.engine.cache import config_and_model
from pyramid_cache.engine.layer import CompressedLayer
from pyramid_cache.engine.pending import PendingTokens
from pyramid_cache.engine.policy import Policy, PromptView, ScoringView, setting
from pyramid_cache.engine.policy_cache import EvictionOptions, PolicyCache
from pyramid_cache.engine.selection import gather_tokens
from pyramid_cache.engine.sharing import SharedBudget
from pyramid_cache.engine.state import LayerState, row, slot
from pyramid_cache.ops.reference import grouped_logits, softmax_of_logits


CACHE_NAMES = ("cache", "past_key_values")
FIRST_INSTRUCTION = "\n\nRepeat the previous context exactly."
LATER_INSTRUCTION = "\n\nRepeat the part of the previous context exactly, starting with"
# Of a later chunk, as many tokens before it follow the instruction.
NUM_LEADING_TOKENS = 8
NUM_SINK_TOKENS = 4
# Replays of more chunks show their progress.
MAX_SILENT_CHUNKS = 4
# Elements of the probabilities of one KV head that are held at once: 64 MiB in float32.
ROW_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class ReplayTexts:
    """
    The token ids of a replay.

    Attributes:
        first, later (`tuple[int, ...]`): The instruction for the first chunk, and for others.
        suffix (`tuple[int, ...]`): Follows the instruction; then comes the chunk.
        prefix (`tuple[int, ...]`): What the chat template puts in front of all messages. A context that begins with it
            is repeated without it.
    """

    first: tuple[int, ...]
    later: tuple[int, ...]
    suffix: tuple[int, ...]
    prefix: tuple[int, ...] = ()

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase) -> "ReplayTexts":
        """The paper's instructions, and what the chat template of a model puts around a message."""
        prefix = suffix = ""
        if tokenizer.chat_template is not None:
            template: Any = tokenizer.apply_chat_template
            messages = [{"role": "user", "content": "?"}]
            without, whole = (template(messages, tokenize=False, add_generation_prompt=adds) for adds in (False, True))
            # What ends the user's turn belongs to it.
            prefix, _, end = without.rpartition("?")
            suffix = end + whole[len(without) :]
        texts = FIRST_INSTRUCTION, LATER_INSTRUCTION, suffix, prefix
        return ReplayTexts(*(tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts))


@dataclass(eq=False)
class ReplayState(LayerState):
    """
    `importance` `(batch, kv_heads, slots)` float32: the score of each token, -1 for those that were not replayed.
    Between a replay and the eviction, `replayed` `(batch, kv_heads, tokens)` are the scores of the latest tokens, the
    first of which is at the position `replay_start` `(batch, 1, 1)` int32.
    """

    importance: torch.Tensor | None = slot(fill=-1)
    replayed: torch.Tensor | None = row()
    replay_start: torch.Tensor | None = row()


@dataclass(frozen=True)
class KVzipPolicy(Policy):
    """A token's score is the attention that a replay of the context gives it at most. See `KVzipCache`."""

    num_recent: int = setting(128, read_count, 1)

    state_class = ReplayState
    ranking = "model"
    waits = True

    def score(self, view: ScoringView) -> torch.Tensor:
        state, positions = view.state, view.positions.expand(view.key.shape[:3])
        importance = view.remembered("importance")
        if importance is None:
            importance = torch.full(positions.shape, -1.0, device=positions.device)
        if state.replayed is not None:
            index = (positions - state.replay_start).long()
            is_new = view.is_token & (index >= 0) & (index < state.replayed.shape[2])
            scores = state.replayed.gather(2, index.clamp(0, state.replayed.shape[2] - 1))
            importance = torch.where(is_new, scores, importance)
            view.remember("importance", importance)
            state.replayed = state.replay_start = None
        always_stays = (importance < 0) & view.is_recent(self.num_recent) | view.is_first(NUM_SINK_TOKENS)
        return importance.masked_fill(always_stays, float("inf"))


@dataclass
class Chunk:
    """
    A part of what is replayed, and what watches the layers meanwhile.

    Attributes:
        starts (`torch.Tensor`): `(batch,)`: the position of its first token in each row.
        lengths (`torch.Tensor`): `(batch,)`: its tokens; shorter rows are filled up behind them.
        num_queries (`torch.Tensor`): `(batch,)`: the queries of the replay before those that fill up.
        row_lengths (`torch.Tensor`): `(batch,)`: the tokens that each row has seen.
        width (`int`): The tokens of the longest row.
        is_weighed (`bool`): Whether probabilities are weighed, as in KVzip+.
        scores (`list[torch.Tensor]`): Of each layer so far, `(batch, kv_heads, width)` float32.
    """

    starts: torch.Tensor
    lengths: torch.Tensor
    num_queries: torch.Tensor
    row_lengths: torch.Tensor
    width: int
    is_weighed: bool
    scores: list[torch.Tensor]

    def observe(self, view: PromptView) -> None:
        """The scores of the chunk's keys in a layer, whose latest keys are those of the replay."""
        batch_size, heads, num_queries, _ = view.query.shape
        kv_heads, device = view.key.shape[1], view.key.device
        group, num_held = heads // kv_heads, view.key.shape[2] - num_queries
        starts, lengths, num_asking, row_lengths = (
            each.to(device) for each in (self.starts, self.lengths, self.num_queries, self.row_lengths)
        )
        # In order, columns without a token come first, then those of the first tokens. The latest tokens are last, and
        # all heads hold them.
        positions = view.positions[..., :num_held]
        order = positions.argsort(dim=-1, stable=True).expand(-1, kv_heads, -1)
        places = torch.arange(self.width, device=device)
        ranks = (num_held - row_lengths + starts)[:, None, None] + places
        columns = order.gather(2, ranks.clamp(max=num_held - 1).expand(-1, kv_heads, -1))
        is_in_chunk = (places < lengths[:, None])[:, None, None]
        num_empty = (positions < 0).sum(dim=-1, keepdim=True)
        ranks = (num_empty + torch.arange(NUM_SINK_TOKENS, device=device)).clamp(max=num_held - 1)
        sinks = order.gather(2, ranks.expand(-1, kv_heads, -1))
        positions = positions.expand(-1, kv_heads, -1).gather(2, sinks)
        is_sink = (positions < NUM_SINK_TOKENS) & (positions < starts[:, None, None])

        weights = None
        if self.is_weighed:
            weights = view.projected_value_norms(2, columns)[:, :, None] / view.hidden_norms()[:, None, :, None]
        scores = view.key.new_zeros(batch_size, kv_heads, self.width, dtype=torch.float32)
        block = max(ROW_ELEMENTS // (batch_size * group * (self.width + num_queries)), 1)
        for head in range(kv_heads):
            members = slice(head * group, (head + 1) * group)
            indices = torch.cat([sinks[:, head], columns[:, head]], dim=-1)[:, None]
            key = torch.cat(
                [gather_tokens(view.key[:, head : head + 1], indices), view.key[:, head : head + 1, num_held:]], dim=2
            ).float()
            for start in range(0, num_queries, block):
                queries = torch.arange(start, min(start + block, num_queries), device=device)
                logits = grouped_logits(view.query[:, members, queries].float(), key, view.scaling, view.softcap)
                is_before = torch.arange(num_queries, device=device) <= queries[:, None]
                parts = is_sink[:, head, None], is_in_chunk[:, 0], is_before[None]
                mask = torch.cat([part.expand(batch_size, len(queries), -1) for part in parts], dim=-1)[:, None, None]
                sink_logits = None if view.sink_logits is None else view.sink_logits[members]
                probabilities = softmax_of_logits(logits, mask, sink_logits)[:, 0]
                found = probabilities[..., NUM_SINK_TOKENS : NUM_SINK_TOKENS + self.width]
                if weights is not None:
                    found = found * weights[:, members, queries]
                found = found.masked_fill((queries >= num_asking[:, None])[:, None, :, None], 0)
                scores[:, head] = torch.maximum(scores[:, head], found.amax(dim=(1, 2)))
        self.scores.append(scores)


class KVzipCache(PolicyCache):
    """
    Keeps what the model needs to repeat its context (KVzip, https://arxiv.org/abs/2505.23416). The question may come
    later: ask as many as you like about the compressed context.

    Each prompt, and each later turn of several tokens, is read whole, and then once more in chunks. So reading takes
    about twice the time, and the memory of `DynamicCache` while it lasts. Then a layer holds `budget` tokens per head
    on average over all layers, and up to `eviction_interval` more in each head. See `PolicyCache` for the errors and
    the other arguments.

    Args:
        model (`PreTrainedModel`): The model, which reads its context again. Hooks stay on it, and do nothing without
            such a cache.
        budget (`float`, `int` or `str`, defaults to 0.3): See `PolicyCache`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Tells the ids of the instruction to repeat and of the chat
            template. By default the one that was saved with the model.
        texts (`ReplayTexts`, *optional*): These ids, instead of a tokenizer. `ReplayTexts((), (), ())` has none. What
            the template puts in front of all messages, such as a default system prompt, is not repeated, and goes
            first. `protect` keeps it.
        chunk_size (`int`, defaults to 2048): How many tokens are repeated at once. Larger chunks take more memory.
        num_recent (`int`, defaults to 128): How many of the latest generated tokens stay, at most half of the budget.

    Raises:
        ValueError: Neither a tokenizer nor texts, and none was saved with the model; ids that the model has not; or it
            is given a config.
        NotImplementedError: The model has an encoder, or a prompt is given as embeddings or has images.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import KVzipCache, ReplayTexts
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> cache = KVzipCache(model, budget=16, texts=ReplayTexts((5, 6), (5, 7), (8,)))
    >>> tokens = model.generate(torch.arange(40)[None], past_key_values=cache, max_new_tokens=1, eos_token_id=None)
    >>> cache.get_seq_length(), sum(cache.num_kept_tokens()) <= 2 * 16
    (40, True)

    ```
    """

    is_weighed = False
    shared: SharedBudget

    def __init__(
        self,
        model: PreTrainedModel,
        budget: float | int | str = 0.3,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        texts: ReplayTexts | Sequence[Sequence[int]] | None = None,
        chunk_size: int = 2048,
        num_recent: int = 128,
        **options: Unpack[EvictionOptions],
    ) -> None:
        config, owner = config_and_model(model)
        if owner is None:
            raise ValueError(f"{type(self).__name__} reads its context again: give the model instead of its config.")
        self.texts = read_texts(owner, tokenizer, texts)
        self.chunk_size = read_count("chunk_size", chunk_size, least=1)
        policy = KVzipPolicy(num_recent)
        super().__init__(config, budget, policy, **options)
        own = [list(each) for each in dataclasses.astuple(self.texts)]
        self.settings |= {"texts": own, "chunk_size": chunk_size}
        self.decoder: weakref.ref[nn.Module] = weakref.ref(hook_decoder(owner))
        self._stop_reading()

    def _stop_reading(self) -> None:
        # The ids of the running forward pass, if it is to be replayed, and how many tokens rows had before.
        self.ids: torch.Tensor | None = None
        self.lengths_before: list[int] = []
        self.is_replaying = False

    def reset(self) -> None:
        super().reset()
        self._stop_reading()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.ids is None and key_states.shape[2] > 1 and not self.policy_is_idle:
            raise ValueError(
                "The cache was built from another model than it is used with, so the prompt could not be read again. "
                "Build it from this model."
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def policy_is_idle(self) -> bool:
        """Whether nothing is ever evicted."""
        return self.compressed_layers[0].budget.is_unlimited

    def begin(self, ids: torch.Tensor) -> None:
        """A forward pass of several tokens `(batch, tokens)` begins, which is to be replayed."""
        layer = self.compressed_layers[0]
        self.ids, self.lengths_before = ids, list(layer.state.row_lengths) or [0] * len(ids)

    def take_up(self) -> None:
        """Replays what all layers have read of a forward pass that broke off behind them."""
        if len(self.shared.waiting) == self.shared.num_layers:
            self.replay()
        self.ids = None

    @torch.no_grad()
    def replay(self) -> None:
        """Reads the tokens of the forward pass that has ended once more, scores them, and lets all layers evict."""
        ids, self.is_replaying = self._ids_in_order(), True
        layers = self.compressed_layers
        others = {index: layer for index, layer in enumerate(self.layers) if not isinstance(layer, CompressedLayer)}
        try:
            lengths = torch.tensor(layers[0].state.row_lengths, device=ids.device)
            before = torch.tensor(self.lengths_before, device=ids.device)
            num_skipped = self._num_skipped(ids, before, lengths - before)
            before = before + num_skipped
            num_new = lengths - before
            scores: list[list[torch.Tensor]] = [[] for _ in layers]
            num_chunks = -(-int(num_new.max()) // self.chunk_size)
            for number in logging.tqdm(range(num_chunks), desc="replay", disable=num_chunks <= MAX_SILENT_CHUNKS):
                for index, layer in others.items():  # these store what they read
                    self.layers[index] = copy.deepcopy(layer)
                chunk = self._read_again(ids, before, num_new, number)
                for own, found in zip(scores, chunk.scores, strict=True):
                    own.append(found)
            for layer, own in zip(layers, scores if num_chunks else [], strict=bool(num_chunks)):
                state = layer.state
                state.replayed = torch.cat(own, dim=2)
                state.replay_start = before[:, None, None].to(state.replayed.device, torch.int32)
        finally:
            for layer in layers:
                layer.pending, layer.arrival, layer.replay = PendingTokens(), None, None
            for index, layer in others.items():
                self.layers[index] = layer
            self._stop_reading()
            self.masks.forget()
        self.shared.settle()

    def _ids_in_order(self) -> torch.Tensor:
        """The ids of the forward pass, those of padding in front of all others of their row."""
        columns = self.masks.columns_read
        if columns is None:
            return self.ids
        is_token = (columns[:, 0, -self.ids.shape[1] :] >= 0).to(self.ids.device)
        return self.ids.gather(1, is_token.int().argsort(dim=1, stable=True))

    def _num_skipped(self, ids: torch.Tensor, before: torch.Tensor, num_new: torch.Tensor) -> torch.Tensor:
        """`(batch,)`: how many tokens of each row are the prefix of the chat template, which is not repeated."""
        prefix = torch.tensor(self.texts.prefix, dtype=ids.dtype, device=ids.device)
        columns = (ids.shape[1] - num_new)[:, None] + torch.arange(len(prefix), device=ids.device)
        found = (ids.gather(1, columns.clamp(max=ids.shape[1] - 1)) == prefix).all(dim=1)
        return len(prefix) * (found & (before == 0) & (num_new >= len(prefix)))

    def _read_again(self, ids: torch.Tensor, before: torch.Tensor, num_new: torch.Tensor, number: int) -> Chunk:
        """Lets the decoder read a chunk of the ids behind its instruction; what it has stored goes again."""
        batch_size, device, texts = len(ids), ids.device, self.texts
        firsts = (ids.shape[1] - num_new)[:, None] + number * self.chunk_size  # columns of `ids`, of which rows differ
        lengths = (num_new - number * self.chunk_size).clamp(0, self.chunk_size)
        width = int(lengths.max())
        num_leading = min(NUM_LEADING_TOKENS, self.chunk_size) if number else 0
        columns = firsts + torch.arange(-num_leading, width, device=device)
        leading, own = ids.gather(1, columns.clamp(0, ids.shape[1] - 1)).tensor_split([num_leading], dim=1)
        instruction, suffix = (
            torch.tensor(given, dtype=ids.dtype, device=device).expand(batch_size, -1)
            for given in (texts.later if number else texts.first, texts.suffix)
        )
        inputs = torch.cat([instruction, leading, suffix, own], dim=1)
        layers = self.compressed_layers
        row_lengths = torch.tensor(layers[0].state.row_lengths, device=device)
        starts = before + number * self.chunk_size
        num_queries = inputs.shape[1] - width + lengths
        num_queries = num_queries.masked_fill(lengths == 0, 0)
        chunk = Chunk(starts, lengths, num_queries, row_lengths, width, self.is_weighed, [])
        for layer in layers:
            layer.pending, layer.replay = PendingTokens(), chunk
            layer.activate_past_recording()
        arguments: dict[str, Any] = {CACHE_ARGUMENT: self, "use_cache": True}
        seen = self._seen_columns()
        if not seen.all():
            arguments["attention_mask"] = torch.cat([seen, torch.ones_like(inputs, dtype=torch.bool)], dim=1).long()
        arguments["position_ids"] = row_lengths[:, None] + torch.arange(inputs.shape[1], device=device)
        with without_collectors():
            self.decoder()(input_ids=inputs, **arguments)
        return chunk

    def _seen_columns(self) -> torch.Tensor:
        """`(batch, columns)` bool: which columns that were seen are tokens, those of evicted ones on the right."""
        layer = self.compressed_layers[0]
        if layer.state.is_dense:
            return layer.store.column_tokens().positions[:, 0] >= 0
        lengths = layer.state.next_position[:, 0]
        return torch.arange(layer.state.num_seen, device=lengths.device) >= layer.state.num_seen - lengths


class KVzipPlusCache(KVzipCache):
    """
    `KVzipCache` with the weights of KVzip+: a probability counts by the norm of what it adds to the hidden state, over
    the norm of that state. See `KVzipCache` for arguments and errors.

    Raises:
        NotImplementedError: The attention layers have no output projection under a known name.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from pyramid_cache import KVzipPlusCache, ReplayTexts
    >>> import torch
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> cache = KVzipPlusCache(model, budget=0.5, texts=ReplayTexts((), (), ()))
    >>> output = model(torch.arange(40)[None], past_key_values=cache)
    >>> sum(cache.num_kept_tokens()) <= 2 * 20
    True

    ```
    """

    is_weighed = True


def read_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: ReplayTexts | Sequence[Sequence[int]] | None,
) -> ReplayTexts:
    """The ids of a replay, as users tell them. Raises ValueError if they cannot be, or no tokenizer is found."""
    if texts is not None:
        given = dataclasses.astuple(texts) if isinstance(texts, ReplayTexts) else texts
        num_ids: Any = model.get_input_embeddings().num_embeddings
        are_sequences = isinstance(given, list | tuple) and all(isinstance(each, list | tuple) for each in given)
        if (
            not are_sequences
            or len(given) not in (3, 4)
            or {type(number) for each in given for number in each} - {int}
        ):
            raise ValueError(
                f"`texts={texts!r}` must be a ReplayTexts, or its three or four sequences of token ids (integers)."
            )
        if any(not 0 <= number < num_ids for each in given for number in each):
            raise ValueError(f"`texts={texts!r}` has a token id outside of the {num_ids} that the model has.")
        return ReplayTexts(*(tuple(each) for each in given))
    if not isinstance(tokenizer, PreTrainedTokenizerBase | None):
        raise ValueError(f"`tokenizer={tokenizer!r}` is no tokenizer of transformers. Give one, or `texts=`.")
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"No tokenizer was saved with the model ({model.config._name_or_path!r}), which tells the ids of the "
                "instruction to repeat the context. Give `tokenizer=`, or the ids themselves as `texts=`."
            ) from error
    return ReplayTexts.of(tokenizer)


def hook_decoder(model: PreTrainedModel) -> nn.Module:
    """Installs the hooks on a model's decoder, once, and returns it."""
    if model.config.is_encoder_decoder:
        raise NotImplementedError(
            f"{type(model).__name__} is an encoder-decoder, whose decoder does not read the context. Use "
            "another cache."
        )
    decoder = model.get_decoder()
    if _before_decoder not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(_before_decoder, with_kwargs=True)
        decoder.register_forward_hook(_after_decoder, with_kwargs=True)
    return decoder


def _cache_of(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> KVzipCache | None:
    """The cache that a decoder is called with, if it was built from this model and is not replaying."""
    found = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
    if found is None:
        found = next((each for each in args if isinstance(each, KVzipCache)), None)
    is_reading = isinstance(found, KVzipCache) and not found.is_replaying and found.decoder() is decoder
    return found if is_reading and not found.policy_is_idle else None


def _before_decoder(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    cache = _cache_of(decoder, args, kwargs)
    if cache is None:
        return
    given = dict(inspect.signature(decoder.forward).bind_partial(*args).arguments) | kwargs
    ids = given.get("input_ids")
    if ids is None and given["inputs_embeds"].shape[1] > 1:
        raise NotImplementedError(
            f"{type(cache).__name__} reads its context again, for which it needs `input_ids`: prompts of embeddings "
            "or images are not supported. Use another cache, such as LayerDefensiveKVCache."
        )
    if cache.ids is not None:  # an earlier forward pass broke off, behind the last layer or before it
        cache.take_up()
    if ids is not None and ids.shape[1] > 1:
        cache.begin(ids)


def _after_decoder(decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    cache = _cache_of(decoder, args, kwargs)
    if cache is not None and cache.ids is not None:
        cache.replay()
