"""Policies that remember a number for each token: it goes wherever its token goes."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from models import left_pad, random_rows, random_tokens, tiny_model
from transformers import PreTrainedConfig

from pyramid_cache import Policy, PolicyCache
from pyramid_cache.engine.policy import PromptView, ScoringView
from pyramid_cache.engine.state import LayerState, row, slot


@dataclass(eq=False)
class Marks(LayerState):
    """`marks` `(batch, 1, slots)`: ten times the position of each token that came with others, -7 for the others."""

    marks: torch.Tensor | None = slot(fill=-7)


@dataclass(frozen=True)
class SmallestKeys(Policy):
    ragged: bool = False
    state_class = Marks
    floor_ratio = 0.2

    def observe(self, prompt: PromptView) -> None:
        num_new, marks = prompt.query.shape[2], prompt.remembered("marks")
        if marks is None:
            marks = prompt.positions.new_full(prompt.positions[:, :1].shape, -7)
        marks[..., -num_new:] = 10 * prompt.query_positions
        prompt.state.marks = marks

    def score(self, view: ScoringView) -> torch.Tensor:
        assert (view.remembered("marks").shape[2]) == view.key.shape[2]
        return -view.key.norm(dim=-1)


class SmallestKeysCache(PolicyCache):
    def __init__(
        self,
        config: PreTrainedConfig,
        budget: int = 12,
        *,
        ragged: bool = False,
        eviction_interval: int = 4,
    ) -> None:
        ranking = "layer" if ragged else "head"
        policy = SmallestKeys(ragged=ragged)
        super().__init__(config, budget, policy, eviction_interval=eviction_interval, ranking=ranking)


def assert_marks(cache: PolicyCache, alone: set[int]) -> None:
    """Each held token has its mark; those at the positions `alone` (counted in columns) came one by one."""
    for layer in cache.layers:
        store = layer.store._unpacked() if getattr(layer.store, "packed", None) else layer.store
        positions = store.held_positions()
        marks = store.in_use("marks").expand_as(positions)
        padding = (layer.state.num_seen - layer.state.next_position).expand_as(positions)
        came_alone = torch.isin(positions + padding, torch.tensor(sorted(alone)))
        expected = torch.where(came_alone, -7, 10 * positions)
        assert torch.equal(marks[positions >= 0], expected[positions >= 0])
        assert (positions >= 0).any()


@pytest.mark.parametrize(("ragged", "interval"), [(False, 1), (False, 4), (True, 4)])
def test_a_number_for_each_token_goes_with_it(ragged: bool, interval: int, tmp_path: Path) -> None:
    model = tiny_model("llama")
    cache = SmallestKeysCache(model.config, ragged=ragged, eviction_interval=interval)
    input_ids, mask = left_pad(random_rows((9, 40), seed=3))
    pieces, alone = [40, 1, 1, 1, 1, 1, 1, 9, *[1] * 7], set()
    for num_new in pieces:
        new = input_ids if num_new == 40 else random_tokens(2, num_new)
        mask = mask if num_new == 40 else torch.cat([mask, torch.ones_like(new)], dim=1)
        if num_new == 1:
            alone.add(cache.get_seq_length())
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -num_new:]
        with torch.no_grad():
            model(new, attention_mask=mask, position_ids=positions, past_key_values=cache)
        assert_marks(cache, alone)
    cache.save(tmp_path / "cache")
    cache = SmallestKeysCache.load(tmp_path / "cache", model)
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    cache.compress()
    assert_marks(cache, alone)


def test_a_number_too_few_is_refused() -> None:
    @dataclass(frozen=True)
    class TooFew(SmallestKeys):
        def observe(self, prompt: PromptView) -> None:
            super().observe(prompt)
            prompt.state.marks = prompt.state.marks[..., 1:]

    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"`TooFew.observe` left `marks` with the shape \(1, 1, 19\)"):
        model(random_tokens(1, 20), past_key_values=PolicyCache(model.config, 12, TooFew()))


def test_a_policy_that_asks_for_rotations_says_so() -> None:
    @dataclass(frozen=True)
    class Unsaid(SmallestKeys):
        def score(self, view: ScoringView) -> torch.Tensor:
            return super().score(view) * view.rotary.rotary_dim

    model = tiny_model("llama")
    with pytest.raises(ValueError, match="`Unsaid` asks .* `needs_rotary = True`"):
        model(random_tokens(1, 20), past_key_values=PolicyCache(model.config, 12, Unsaid()))


@dataclass(eq=False)
class Noted(LayerState):
    noted: torch.Tensor | None = row()


def test_a_field_that_is_not_declared_is_refused() -> None:
    """Else it would not go with its tokens."""

    @dataclass(frozen=True)
    class InPrompt(Policy):
        def observe(self, prompt: PromptView) -> None:
            prompt.remember("noted", prompt.key.norm(dim=-1))

        def score(self, view: ScoringView) -> torch.Tensor:
            return view.remembered("noted")

    @dataclass(frozen=True)
    class InScore(InPrompt):
        state_class = Noted  # of another kind

        def observe(self, prompt: PromptView) -> None:
            pass

        def score(self, view: ScoringView) -> torch.Tensor:
            view.remember("noted", view.key.norm(dim=-1))

    model = tiny_model("llama")
    for policy, name in ((InPrompt(), "LayerState"), (InScore(), "Noted")):
        with pytest.raises(ValueError, match=rf"`remember\('noted'\)`: {name}, .*no `slot\(\)` field"):
            model(random_tokens(1, 20), past_key_values=PolicyCache(model.config, 12, policy))
