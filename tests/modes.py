"""The table of the ways to call `generate`, and the oracle that says whether a cache came out of one of them right.

A mode is a function that generates through a `Run`. Whatever the mode, a cache must end as if each of its rows had
been fed alone, piece by piece, to a new cache: the same logits after every piece, the same positions held, the same
answer to one more token. The run writes down what each cache was fed, follows rows that are reordered and tokens that
are taken back, and `Run.verify` does the comparison. What a mode promises beyond that, it asserts itself.
"""

import contextlib
import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache as remember
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from caches import CACHE_CASES, QUICK_CASES, CacheCase
from models import VOCAB_SIZE, build_model, drive, generate, left_pad, random_rows, random_tokens, tiny_model
from places import FIRST, OFFLOADS, two_devices
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.utils._pytree import tree_leaves
from transformers import (
    Cache,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from pyramid_cache.engine.quantized_store import QuantizedStore


MakeCache = Callable[[PreTrainedModel], Cache]

# Prompts of 40 and 29 tokens: a tight budget evicts from both.
PROMPT_LENGTHS = (40, 29)
# After 24 generated tokens PyramidCache has judged a zone of them.
PAST_A_ZONE = 26
PROBE_TOKEN = 7
# What transformers calls a cache, in arguments and outputs: from 5.24 on, and before.
CACHE_NAMES = ("cache", "past_key_values")


class History:
    """What a cache was fed, in the order of the rows it has now.

    Attributes:
        tensors: Tokens `(batch, seen)`; which of them are no padding `(batch, seen)`; the logits after each of them
            `(batch, seen, vocabulary)`, not a number where the model returned none.
        num_fed: The number of tokens of each forward pass, padding included.
        takes_back: Whether tokens may be taken back from the cache, so that it evicts later than it would.
    """

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.num_fed: list[int] = []
        self.takes_back = False

    def feed(self, tokens: torch.Tensor, is_token: torch.Tensor, logits: torch.Tensor) -> None:
        """Writes a forward pass down, which returned the last logits alone or more."""
        logits = torch.nn.functional.pad(logits, (0, 0, tokens.shape[1] - logits.shape[1], 0), value=torch.nan)
        new = [tokens, is_token, logits]
        self.tensors = (
            [torch.cat(pair, dim=1) for pair in zip(self.tensors, new, strict=True)] if self.tensors else new
        )
        self.num_fed.append(tokens.shape[1])

    def of_row(self, row: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """A row's pieces without padding, and the logits `(vocabulary,)` after each."""
        pieces = zip(*(tensor[row].split(self.num_fed) for tensor in self.tensors), strict=True)
        kept = [(tokens[is_token], logits[-1]) for tokens, is_token, logits in pieces if is_token.any()]
        return [tokens for tokens, _ in kept], [logits for _, logits in kept]

    def map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Follows the rows of the cache."""
        self.tensors = [function(tensor) for tensor in self.tensors]

    def take_back(self, count: int) -> None:
        """Follows a `crop`."""
        self.tensors = [tensor[:, : tensor.shape[1] - count] for tensor in self.tensors]
        while count:
            last = self.num_fed.pop()
            self.num_fed += [last - count] if last > count else []
            count -= min(count, last)


class Run:
    """One run of a mode with one kind of cache.

    Attributes:
        sequences: What each `generate` returned.
        numbers: Every float tensor that each `generate` returned: scores, logits, hidden states.
        kept: The caches that are verified, with their histories.
    """

    def __init__(self, model: PreTrainedModel, make_cache: MakeCache) -> None:
        self.model = model
        self.make_cache = make_cache
        self.sequences: list[torch.Tensor] = []
        self.numbers: list[torch.Tensor] = []
        self.kept: list[tuple[Cache, History]] = []

    def new_cache(self) -> Cache:
        """An empty cache, whose history is written down from here on."""
        cache = self.make_cache(self.model)
        self.kept.append((cache, History()))
        return cache

    def plain(self, rows: list[torch.Tensor], max_new_tokens: int) -> torch.Tensor:
        """What plain greedy decoding gives, to compare with."""
        return generate(self.model, self.make_cache(self.model), rows, max_new_tokens).sequences

    def copy_of(self, cache: Cache) -> Cache:
        """A deep copy of a cache, with its history."""
        twin = copy.deepcopy(cache)
        self.kept.append((twin, copy.deepcopy(self.history_of(cache))))
        return twin

    def history_of(self, cache: Cache | None) -> History | None:
        """The history of a cache of this run."""
        return next((history for kept, history in self.kept if kept is cache), None)

    def generate(self, cache: Cache, rows: list[torch.Tensor] | None = None, **settings: Any) -> torch.Tensor:
        """
        The sequences of `model.generate` from left-padded prompts, everything that it can return being collected.
        Without prompts `settings` say what is fed.
        """
        if rows is not None:
            input_ids, attention_mask = left_pad(rows)
            settings = {"input_ids": input_ids, "attention_mask": attention_mask, **settings}
        defaults = {"do_sample": False, "output_scores": True, "output_logits": True, "return_dict_in_generate": True}
        with self.recording():
            output = self.model.generate(past_key_values=cache, **{**defaults, **settings})
        if not isinstance(output, torch.Tensor):
            assert cache_among(output) is cache
            leaves = tree_leaves([value for name, value in output.items() if name not in CACHE_NAMES])
            self.numbers += [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
            output = output.sequences
        self.sequences.append(output)
        return output

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Writes down what the caches of this run are fed."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.model.register_forward_hook(self._write_down, with_kwargs=True).remove)
            for cache_class, name in itertools.product({type(cache) for cache, _ in self.kept}, FOLLOWED_METHODS):
                method = self._followed(getattr(cache_class, name), FOLLOWED_METHODS[name])
                stack.enter_context(patch.object(cache_class, name, method))
            yield

    def _write_down(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        history = self.history_of(cache_among(kwargs))
        if history is None:
            return
        tokens = kwargs.get("input_ids")
        if tokens is None:
            table = model.get_input_embeddings().weight
            tokens = torch.cdist(kwargs["inputs_embeds"].float(), table[None].float()).argmin(-1)
        mask = kwargs.get("attention_mask")
        is_token = torch.ones_like(tokens).bool() if mask is None else mask[:, -tokens.shape[1] :] != 0
        history.feed(tokens.clone(), is_token.clone(), output.logits.detach().clone())

    def _followed(self, method: Callable, follow: Callable[[History, Any], None]) -> Callable:
        def followed(cache: Cache, *args: Any) -> None:
            method(cache, *args)
            history = self.history_of(cache)
            if history is not None:
                follow(history, *args)

        return followed

    def verify(self) -> None:
        """Compares every cache with new ones that are fed its rows alone."""
        for cache, history in self.kept:
            if history.num_fed:
                self._verify(cache, history)

    @torch.inference_mode()
    def _verify(self, cache: Cache, history: History) -> None:
        is_token = history.tensors[1]
        assert cache.get_seq_length() == is_token.shape[1]
        answer = self.model(
            input_ids=torch.full((len(is_token), 1), PROBE_TOKEN),
            attention_mask=torch.cat([is_token, is_token.new_ones(len(is_token), 1)], dim=1).long(),
            position_ids=is_token.sum(dim=1, keepdim=True),
            past_key_values=cache,
        ).logits[:, -1]
        if history.takes_back:
            cache.crop(0)
        for row in range(len(is_token)):
            alone = self.make_cache(self.model)
            pieces, logits = history.of_row(row)
            if history.takes_back:
                alone.activate_past_recording()
            prompt, *later = [*pieces, torch.tensor([PROBE_TOKEN])]
            after_step = (lambda step, alone=alone: alone.crop(0)) if history.takes_back else None
            lengths = [len(piece) for piece in later]
            trace = drive(self.model, alone, [prompt], torch.cat(later)[None], after_step, pieces=lengths)
            # Rounding may move a number to the next of the codes that it is quantised to.
            atol = 2e-3 if isinstance(cache.compressed_layers[0].store, QuantizedStore) else 1e-4
            assert_close(torch.stack([*logits, answer[row]]), trace.logits[0], f"row {row}", atol)
            for layer in range(len(cache.layers)):
                expected = held_positions(alone, layer)[0]
                assert held_positions(cache, layer)[row] == expected, (row, layer)


def cache_among(named: Mapping[str, Any]) -> Cache | None:
    """The cache among the arguments or the outputs of a model or of `generate`, by whatever name."""
    return next((named[name] for name in CACHE_NAMES if name in named.keys()), None)


def held_positions(cache: Cache, layer: int) -> list[list[list[int]]]:
    """The positions that each head of each row holds, in rising order."""
    rows = cache.positions(layer).tolist()
    return [[sorted(position for position in head if position >= 0) for head in row] for row in rows]


FOLLOWED_METHODS: dict[str, Callable[[History, Any], None]] = {
    "reorder_cache": lambda history, rows: history.map_rows(lambda tensor: tensor[rows]),
    "batch_select_indices": lambda history, rows: history.map_rows(lambda tensor: tensor[rows]),
    "batch_repeat_interleave": lambda history, count: history.map_rows(
        lambda tensor: tensor.repeat_interleave(count, 0)
    ),
    "crop": lambda history, tokens_to_remove: history.take_back(-tokens_to_remove),
    "activate_past_recording": lambda history: setattr(history, "takes_back", True),
}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, message: str = "", atol: float = 1e-4) -> None:
    """Equal but for the order of float32 sums; -inf, as logits processors write it, being equal to itself."""
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0, msg=lambda text: f"{message}: {text}")


def prompts(*lengths: int) -> list[torch.Tensor]:
    """Random prompts of these lengths."""
    return random_rows(lengths or PROMPT_LENGTHS, seed=40)


# Plain decoding.


def generates(*lengths: int, new_tokens: int = 8, **settings: Any) -> Callable[[Run], None]:
    """A mode that promises nothing of its own: prompts of these lengths, and settings of `generate`."""

    def function(run: Run) -> None:
        torch.manual_seed(7)
        run.generate(run.new_cache(), prompts(*lengths), max_new_tokens=new_tokens, **settings)

    return function


def as_plain(*lengths: int, within: Callable = contextlib.nullcontext, **settings: Any) -> Callable[[Run], None]:
    """A mode whose tokens are those of plain decoding, within a context or not."""

    def function(run: Run) -> None:
        wanted = run.plain(prompts(*lengths), 8)
        with within():
            tokens = run.generate(run.new_cache(), prompts(*lengths), **{"max_new_tokens": 8, **settings})
        assert torch.equal(tokens, wanted)

    return function


def read(run: Run, row: torch.Tensor, context: Callable[[], Any] = torch.no_grad) -> Cache:
    """A cache that has read a prompt."""
    cache = run.new_cache()
    with run.recording(), context():
        run.model(input_ids=row[None], past_key_values=cache)
    return cache


def inference_mode_before(run: Run) -> None:
    """A cache that was filled in inference mode and is used outside of it."""
    row = prompts(40)[0]
    run.generate(read(run, row[:30], torch.inference_mode), [row], max_new_tokens=PAST_A_ZONE)


# What watches or steers the tokens.


@remember
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Writes token 17 as `t017`."""
    vocabulary = {word(index): index for index in range(VOCAB_SIZE)}
    # transformers tokenizes this word to learn how tokens are joined.
    vocabulary["abcdef"] = VOCAB_SIZE
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=word(2)))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=word(0))


def word(token: int) -> str:
    """How `tiny_tokenizer` writes a token."""
    return f"t{token:03d}"


def stop_at_48(tokens: torch.Tensor, scores: Any, **ignored: Any) -> torch.Tensor:
    return torch.full((len(tokens),), tokens.shape[1] >= 48)


def forbid_last_token(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return scores.scatter(1, tokens[:, -1:], -torch.inf)


# Prompts of every kind.


def input_embeddings(run: Run) -> None:
    input_ids, attention_mask = left_pad(prompts())
    wanted = run.plain(prompts(), 8)
    embeddings = run.model.get_input_embeddings()(input_ids).detach()
    tokens = run.generate(run.new_cache(), inputs_embeds=embeddings, attention_mask=attention_mask, max_new_tokens=8)
    assert torch.equal(tokens, wanted[:, 40:])


def chunked_prefill(run: Run) -> None:
    cache = run.new_cache()
    # Both rows begin in the first chunk, with different numbers of tokens in it.
    run.generate(cache, prompts(40, 37), max_new_tokens=8, prefill_chunk_size=7)
    assert run.history_of(cache).num_fed == [7, 7, 7, 7, 7, 5, *[1] * 7]


# Several turns.


def turns(number: int, is_unseen: bool = False) -> Callable[[Run], None]:
    """A mode of several turns: each hands in the full history, or only what is new with a mask over everything."""

    def function(run: Run) -> None:
        cache = run.new_cache()
        tokens = run.generate(cache, prompts(), max_new_tokens=6)
        _, mask = left_pad(prompts())
        for turn in range(number):
            tokens = torch.cat([tokens, random_tokens(2, 9, seed=turn)], dim=1)
            mask = torch.cat([mask, mask.new_ones(2, tokens.shape[1] - mask.shape[1])], dim=1)
            fed = tokens[:, cache.get_seq_length() :] if is_unseen else tokens
            answer = run.generate(cache, input_ids=fed, attention_mask=mask, max_new_tokens=6)
            tokens = torch.cat([tokens, answer[:, -6:]], dim=1)
        # After a turn the last token of the answer has not been fed, so it comes with the next.
        assert run.history_of(cache).num_fed == [40, *[1] * 5, *[10, *[1] * 5] * number]

    return function


def copied_prefix(run: Run) -> None:
    row = prompts(40)[0]
    prefix = read(run, row)
    for seed in range(2):
        run.generate(run.copy_of(prefix), [torch.cat([row, random_tokens(6, seed=seed)])], max_new_tokens=6)


def nothing_new(run: Run) -> None:
    """A prompt that the cache has already seen to its end: there is no logit to go on from."""
    row = prompts(40)[0]
    run.generate(read(run, row), input_ids=row[None], max_new_tokens=4)


# Decoding that takes tokens back.


@remember
def draft_model() -> PreTrainedModel:
    """Another model with the same vocabulary."""
    return build_model("llama", seed=99, num_hidden_layers=1)


def repeating_prompt() -> torch.Tensor:
    """A prompt of 42 tokens in which a phrase comes six times, so that there is something to look up."""
    return random_tokens(7, seed=3).repeat(6)


def assisted(settings_of: Callable[[Run], dict[str, Any]], new_tokens: int = 20) -> Callable[[Run], None]:
    """A mode that guesses: every token is the best of the logits that the pieces which stayed were answered with."""

    def function(run: Run) -> None:
        cache = run.new_cache()
        tokens = run.generate(cache, [repeating_prompt()], max_new_tokens=new_tokens, **settings_of(run))
        fed, _, logits = run.history_of(cache).tensors
        assert torch.equal(fed, tokens[:, :-1])
        best = logits[:, ~logits[0].isnan().any(dim=-1)].argmax(-1)[:, -20:]
        assert torch.equal(best, tokens[:, -best.shape[1] :])

    return function


# Weights that are elsewhere.


def offloaded(name: str) -> Callable[[Run], None]:
    """A model whose weights wait elsewhere gives the tokens of one whose weights have stayed."""

    def function(run: Run) -> None:
        wanted = run.plain(prompts(), 8)
        run.model = OFFLOADS[name](copy.deepcopy(run.model), offload_folder().name)
        assert torch.equal(run.generate(run.new_cache(), prompts(), max_new_tokens=8), wanted)

    return function


@remember
def offload_folder() -> tempfile.TemporaryDirectory:
    """Where weights wait until the tests end."""
    return tempfile.TemporaryDirectory()


def on_two_devices(run: Run) -> None:
    wanted, (input_ids, mask) = run.plain(prompts(), 8), left_pad(prompts())
    with two_devices(copy.deepcopy(run.model)) as model:
        settings = {"attention_mask": mask.to(FIRST), "past_key_values": run.make_cache(model), "max_new_tokens": 8}
        tokens = model.generate(input_ids.to(FIRST), do_sample=False, **settings).tolist()
    run.sequences.append(torch.tensor(tokens))
    assert torch.equal(run.sequences[0], wanted)


@dataclass(frozen=True)
class Mode:
    """
    A way to call `generate`: its name in test ids and in docs/compatibility.md, what generates and asserts what only
    this mode promises, the attention of the model, and whether no cache that is handed in fits, whatever its budget.
    """

    name: str
    function: Callable[[Run], None]
    attention: str = "sdpa"
    never_fits: bool = False

    def run(self, make_cache: MakeCache) -> Run:
        """Runs it with a new cache."""
        run = Run(model_with(self.attention), make_cache)
        self.function(run)
        return run


NO_DICTIONARY = {"output_scores": False, "output_logits": False, "return_dict_in_generate": False}
MODES = (
    Mode("greedy", generates(new_tokens=PAST_A_ZONE)),
    Mode("sampling", generates(do_sample=True, temperature=1.5, top_k=20, top_p=0.9)),
    Mode("sampling, `top_k=1`", as_plain(do_sample=True, top_k=1)),
    Mode("`num_return_sequences`", generates(do_sample=True, top_k=30, temperature=2.0, num_return_sequences=2)),
    Mode("beam search", generates(new_tokens=PAST_A_ZONE, num_beams=2)),
    Mode("beam search, `num_return_sequences`", generates(num_beams=3, num_return_sequences=2)),
    Mode("beam sampling", generates(num_beams=3, do_sample=True, temperature=1.5)),
    Mode("own streamer", as_plain(40, streamer=Mock())),
    Mode("`TextIteratorStreamer`", as_plain(40, streamer=TextIteratorStreamer(tiny_tokenizer()))),
    Mode("own stopping criteria", as_plain(max_new_tokens=20, stopping_criteria=StoppingCriteriaList([stop_at_48]))),
    Mode("`stop_strings`", generates(40, new_tokens=10, stop_strings=["6"], tokenizer=tiny_tokenizer())),
    Mode("`max_time`", as_plain(max_time=600.0)),
    Mode("`eos_token_id`, rows ending apart", generates(new_tokens=10, eos_token_id=[*range(3, 20)])),
    Mode("own logits processor", generates(logits_processor=LogitsProcessorList([forbid_last_token]))),
    Mode("`repetition_penalty`", generates(repetition_penalty=1.5)),
    Mode("`no_repeat_ngram_size`", generates(40, new_tokens=PAST_A_ZONE, no_repeat_ngram_size=2)),
    Mode("`guidance_scale`", generates(40, new_tokens=6, guidance_scale=1.5)),
    Mode("`output_scores`, `output_logits`, `return_dict_in_generate`", as_plain(**NO_DICTIONARY)),
    Mode("`output_attentions`", generates(new_tokens=4, output_attentions=True), attention="eager"),
    Mode("`output_hidden_states`", generates(new_tokens=4, output_hidden_states=True)),
    Mode("`torch.inference_mode()`", as_plain(within=torch.inference_mode)),
    Mode("cache filled in `torch.inference_mode()`, used outside", inference_mode_before),
    Mode("left-padded batch", generates(5, 60, 33, new_tokens=12)),
    Mode("`inputs_embeds`", input_embeddings),
    Mode("`position_ids`", as_plain(position_ids=(left_pad(prompts())[1].cumsum(-1) - 1).clamp(min=0))),
    Mode("prompts of one token", generates(1, 1, new_tokens=PAST_A_ZONE)),
    Mode("one new token", generates(new_tokens=1)),
    Mode("`prefill_chunk_size`", chunked_prefill),
    Mode("next turn: full history", turns(4)),
    Mode("next turn: new tokens, mask over everything", turns(1, is_unseen=True)),
    Mode("next turn: nothing new", nothing_new, never_fits=True),
    Mode("`copy.deepcopy` of a prefix", copied_prefix),
    Mode("assisted, another draft model", assisted(lambda run: {"assistant_model": draft_model()})),
    Mode("assisted, the same model as draft", assisted(lambda run: {"assistant_model": run.model})),
    Mode("assisted sampling", generates(40, new_tokens=12, assistant_model=draft_model(), do_sample=True)),
    Mode("assisted, `assistant_early_exit`", assisted(lambda run: {"assistant_early_exit": 1}, new_tokens=12)),
    Mode("prompt lookup", assisted(lambda run: {"prompt_lookup_num_tokens": 3})),
    Mode("`use_cache=False`", generates(40, new_tokens=4, use_cache=False), never_fits=True),
    Mode("`cache_implementation` as well", generates(new_tokens=4, cache_implementation="dynamic"), never_fits=True),
    *(Mode(name, offloaded(name)) for name in OFFLOADS),
    Mode("`device_map`: layers on two devices", on_two_devices),
)


@remember
def model_with(attention: str) -> PreTrainedModel:
    return tiny_model("llama") if attention == "sdpa" else build_model("llama", attention=attention)


def verdict(mode: Mode, case: CacheCase) -> str:
    """
    What docs/compatibility.md says of a mode with a cache of a tight budget, which is run once in a session: "yes",
    "refused: " and the first sentence of the error, or "WRONG: " and what differs.
    """
    key = mode.name, case.name
    if key not in _verdicts:
        try:
            mode.run(case.build).verify()
            _verdicts[key] = "yes"
        except (NotImplementedError, ValueError) as error:
            _verdicts[key] = f"refused: {first_sentence(str(error))}"
        except AssertionError as error:
            _verdicts[key] = f"WRONG: {' '.join(str(error).split())}"
    return _verdicts[key]


_verdicts: dict[tuple[str, str], str] = {}


def first_sentence(message: str) -> str:
    """A message up to its first full stop, on one line; the cache has the name in it that all versions know."""
    sentence = " ".join(message.split()).split(". ")[0].rstrip(".")
    return sentence.replace("`cache` (a Cache object)", "`past_key_values` (a Cache object)")


# What a cache can be asked to do, by the modes that ask for it: each of them runs with each cache of the quick tier.
MECHANISMS = {
    "beam search",
    "`prefill_chunk_size`",
    "next turn: full history",
    "assisted, another draft model",
    "cache filled in `torch.inference_mode()`, used outside",
}


def is_in_quick_tier(turn: int, mode: Mode, case: CacheCase) -> bool:
    """Whether a test of every mode, of which this is number `turn`, runs with a cache without `-m slow`."""
    return case is QUICK_CASES[turn % len(QUICK_CASES)] or (mode.name in MECHANISMS and case in QUICK_CASES)


def parametrize_modes(period: int) -> pytest.MarkDecorator:
    """
    Runs a test with pairs of a mode and a cache: every mode with one cache of the quick tier, and in the slow tier
    with every `period`-th of all caches.
    """
    return pytest.mark.parametrize(
        "mode, case",
        [
            pytest.param(
                mode, case, id=f"{mode.name.replace('`', '')}-{case.name}", marks=() if is_quick else pytest.mark.slow
            )
            for turn, mode in enumerate(MODES)
            for column, case in enumerate(CACHE_CASES)
            if (is_quick := is_in_quick_tier(turn, mode, case)) or (turn + column) % period == 0
        ],
    )


def fitting_modes(*quick: str) -> list:
    """The modes that some cache fits, each once; of the quick tier are some that move rows, and those named."""
    quick = ("beam search", "`prefill_chunk_size`", "`device_map`: layers on two devices", *quick)
    return [
        pytest.param(mode, id=mode.name.replace("`", ""), marks=() if mode.name in quick else pytest.mark.slow)
        for mode in MODES
        if not mode.never_fits
    ]
