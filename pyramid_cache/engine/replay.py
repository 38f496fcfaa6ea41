"""
Caches that read each prompt a second time, in chunks behind an instruction to repeat it (Kim et al., 2025,
https://arxiv.org/abs/2505.23416, Section 3), and watch it. The replay costs about as much as reading the context, and
leaves no keys.

Hooks on the decoder of a model tell when a forward pass has ended. Rows of a batch are replayed together, each with
its own chunks.
"""

import copy
import dataclasses
import inspect
import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import CacheLayerMixin
from transformers.utils import logging
from typing_extensions import Unpack

from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.engine.attention import without_collectors
from pyramid_cache.engine.beside import StatesBeside
from pyramid_cache.engine.budget import read_count
from pyramid_cache.engine.cache import config_and_model
from pyramid_cache.engine.compaction import Compactor
from pyramid_cache.engine.layer import CompressedLayer
from pyramid_cache.engine.pending import PendingTokens
from pyramid_cache.engine.policy import Policy
from pyramid_cache.engine.policy_cache import EvictionOptions, PolicyCache
from pyramid_cache.engine.sharing import SharedBudget


CACHE_NAMES = ("cache", "past_key_values")
FIRST_INSTRUCTION = "\n\nRepeat the previous context exactly."
LATER_INSTRUCTION = "\n\nRepeat the part of the previous context exactly, starting with"
# Of a later chunk, as many tokens before it follow the instruction.
NUM_LEADING_TOKENS = 8
# Replays of more chunks show their progress.
MAX_SILENT_CHUNKS = 4


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


@dataclass(frozen=True)
class Chunk:
    """
    A part of what is replayed.

    Attributes:
        starts (`torch.Tensor`): `(batch,)`: the position of its first token in each row.
        lengths (`torch.Tensor`): `(batch,)`: its tokens; shorter rows are filled up behind them.
        num_queries (`torch.Tensor`): `(batch,)`: the queries of the replay before those that fill up.
        row_lengths (`torch.Tensor`): `(batch,)`: the tokens that each row has seen.
        width (`int`): The tokens of the longest row.
        turn_starts (`torch.Tensor`): `(batch,)`: the position of the first token that is new. Those that the template
            puts in front of all messages are not replayed.
        turn_lengths (`torch.Tensor`): `(batch,)`: the tokens of all chunks.
    """

    starts: torch.Tensor
    lengths: torch.Tensor
    num_queries: torch.Tensor
    row_lengths: torch.Tensor
    width: int
    turn_starts: torch.Tensor
    turn_lengths: torch.Tensor


class ReplayingCache(PolicyCache):
    """
    Reads each prompt, and each later turn of several tokens, once more when it has ended. Then all layers evict. See
    `KVzipCache` for arguments and errors.
    """

    shared: SharedBudget
    waits = True

    def __init__(
        self,
        model: PreTrainedModel,
        budget: float | int | str,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase | None,
        texts: "ReplayTexts | Sequence[Sequence[int]] | None",
        chunk_size: int,
        compactor: Callable[[], Compactor] | None = None,
        **options: Unpack[EvictionOptions],
    ) -> None:
        config, owner = config_and_model(model)
        if owner is None:
            raise ValueError(f"{type(self).__name__} reads its context again: give the model instead of its config.")
        self.texts = read_texts(owner, tokenizer, texts) if self.waits else ReplayTexts((), (), ())
        self.chunk_size = read_count("chunk_size", chunk_size, least=1)
        super().__init__(config, budget, policy, compactor=compactor, **options)
        own = [list(each) for each in dataclasses.astuple(self.texts)]
        self.settings |= {"texts": own, "chunk_size": chunk_size}
        self.find_decoder: Callable[[], Any] = weakref.ref(hook_decoder(owner)) if self.waits else no_decoder
        self._stop_reading()

    @abstractmethod
    def watch(self, chunk: Chunk) -> Any:
        """What watches the replay of a chunk: each layer in turn calls its `observe` with a `PromptView`."""

    @abstractmethod
    def take_in(self, watchers: list[Any], starts: torch.Tensor) -> None:
        """
        Gives the layers what the watchers of all chunks have seen, before they evict. `starts` `(batch,)` are the
        positions of the first tokens that were replayed.
        """

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
        if self.ids is None and self.replays and self.reads_prompt(key_states.shape[2]):
            raise ValueError(
                "The cache was built from another model than it is used with, so the prompt could not be read again. "
                "Build it from this model."
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def replays(self) -> bool:
        """Whether prompts are read again: not if nothing is ever evicted, or nothing is learned from it."""
        return self.waits and not self.compressed_layers[0].budget.is_unlimited

    def reads_prompt(self, num_new: int) -> bool:
        """Whether a forward pass of so many tokens is more than a decode step."""
        if torch.compiler.is_compiling():  # a step: guards on lengths would compile each anew
            return num_new > 1
        row_lengths = self.compressed_layers[0].state.row_lengths
        return num_new > 1 or not row_lengths or not all(row_lengths)

    def begin(self, ids: torch.Tensor, lengths_before: Sequence[int]) -> None:
        """A forward pass of several tokens `(batch, tokens)` begins, which is to be replayed."""
        self.ids, self.lengths_before = ids, list(lengths_before) or [0] * len(ids)

    def take_up(self) -> None:
        """Replays what all layers have read of a forward pass that broke off behind them, or in its replay."""
        if self.ids is None or self.is_replaying or len(self.shared.waiting) < self.shared.num_layers:
            return
        # Layers of other kinds may be behind them, which have not read it yet.
        if len({layer.get_seq_length() for layer in self.layers if isinstance(layer, CacheLayerMixin)}) == 1:
            self.replay()

    def require_whole(self) -> None:
        super().require_whole()
        self.take_up()

    def release(self) -> None:
        super().release()
        self.take_up()

    def replay(self) -> None:
        """Reads the tokens of the forward pass that has ended once more, and lets all layers evict."""
        self.settle_with(*self.read_again())

    def settle_with(self, watchers: list[Any], starts: torch.Tensor) -> None:
        """Lets all layers evict after a replay, which `read_again` gave."""
        if watchers:
            self.take_in(watchers, starts)
        self._stop_reading()
        self.shared.settle()

    @torch.no_grad()
    def read_again(self) -> tuple[list[Any], torch.Tensor]:
        """Reads the tokens of the forward pass that has ended once more: the arguments of `settle_with`."""
        ids, self.is_replaying = self._ids_in_order(), True
        layers, watchers = self.compressed_layers, []
        others = {index: layer for index, layer in enumerate(self.layers) if not isinstance(layer, CompressedLayer)}
        beside = {layer: layer.states for layer in layers if isinstance(layer, StatesBeside)}
        try:
            lengths = torch.tensor(layers[0].state.row_lengths, device=ids.device)
            before = torch.tensor(self.lengths_before, device=ids.device)
            before = before + self._num_skipped(ids, before, lengths - before)
            num_new = lengths - before
            num_chunks = -(-int(num_new.max()) // self.chunk_size)
            for number in logging.tqdm(range(num_chunks), desc="replay", disable=num_chunks <= MAX_SILENT_CHUNKS):
                for index, layer in others.items():  # these store what they read
                    self.layers[index] = copy.deepcopy(layer)
                for layer, states in beside.items():
                    layer.states = copy.deepcopy(states)
                self._seen_by_states.clear()
                watchers.append(self._read_chunk(ids, before, num_new, number))
        finally:
            for layer in layers:
                layer.pending, layer.arrival, layer.replay = PendingTokens(), None, None
            for index, layer in others.items():
                self.layers[index] = layer
            for layer, states in beside.items():
                layer.states = states
            self._seen_by_states.clear()
            self.is_replaying = False
            self.masks.forget()
        return watchers, before

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

    def _read_chunk(self, ids: torch.Tensor, before: torch.Tensor, num_new: torch.Tensor, number: int) -> Any:
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
        turn_starts = torch.tensor(self.lengths_before, device=device)
        watcher = self.watch(Chunk(starts, lengths, num_queries, row_lengths, width, turn_starts, num_new))
        for layer in layers:
            layer.pending, layer.replay = PendingTokens(), watcher
            layer.activate_past_recording()
        arguments: dict[str, Any] = {CACHE_ARGUMENT: self, "use_cache": True}
        seen = self._seen_columns()
        if not seen.all():
            arguments["attention_mask"] = torch.cat([seen, torch.ones_like(inputs, dtype=torch.bool)], dim=1).long()
        arguments["position_ids"] = row_lengths[:, None] + torch.arange(inputs.shape[1], device=device)
        with without_collectors():
            self.find_decoder()(input_ids=inputs, **arguments)
        return watcher

    def _seen_columns(self) -> torch.Tensor:
        """`(batch, columns)` bool: which columns that were seen are tokens, those of evicted ones on the right."""
        layer = self.compressed_layers[0]
        if layer.state.is_dense:
            return layer.store.column_tokens().positions[:, 0] >= 0
        lengths = layer.state.next_position[:, 0]
        return torch.arange(layer.state.num_seen, device=lengths.device) >= layer.state.num_seen - lengths


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


def no_decoder() -> None:
    """That of a cache that reads no prompt again."""


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


def _cache_of(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> ReplayingCache | None:
    """The cache that a decoder is called with, if it was built from this model and is not replaying."""
    found = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
    if found is None:
        found = next((each for each in args if isinstance(each, ReplayingCache)), None)
    is_reading = isinstance(found, ReplayingCache) and not found.is_replaying and found.find_decoder() is decoder
    return found if is_reading and found.replays else None


def _before_decoder(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    cache = _cache_of(decoder, args, kwargs)
    if cache is None:
        return
    given = dict(inspect.signature(decoder.forward).bind_partial(*args).arguments) | kwargs
    ids = given.get("input_ids")
    embeds = given.get("inputs_embeds")
    if ids is None and embeds is not None and cache.reads_prompt(embeds.shape[1]):
        raise NotImplementedError(
            f"{type(cache).__name__} reads its context again, for which it needs `input_ids`: prompts of embeddings "
            "or images are not supported. Use another cache, such as LayerDefensiveKVCache."
        )
    cache.take_up()
    if ids is not None and cache.reads_prompt(ids.shape[1]):
        cache.begin(ids, cache.compressed_layers[0].state.row_lengths)


def _after_decoder(decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    cache = _cache_of(decoder, args, kwargs)
    if cache is not None and cache.ids is not None:
        cache.replay()
