"""DefensiveKV against loops over rows, heads and queries, and its first stage by hand."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from models import build_model, drive, random_rows, random_tokens, tiny_model
from reference import compare_with_policies, run_policy
from test_critical_kv import PIECES, SETTINGS, WeighedPolicy
from test_layers_share import slow_positions, slow_shares
from test_masked_dense import compare_with_masked_dense

from pyramid_cache import DefensiveKVCache, LayerDefensiveKVCache
from pyramid_cache.caches.defensive_kv import DefensivePolicy
from pyramid_cache.engine.policy import ScoringView


@dataclass
class DefensiveReference(WeighedPolicy):
    """`peaks[layer, head][token]`: what any query of the window gave it at most, with its neighbours."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peaks: dict[tuple[int, int], dict[int, float]] = {}

    def observe(self, position: int, held: list[list[int]]) -> None:
        group, num_new = self.query.shape[0] // len(held), self.num_new[position]
        for head, tokens in enumerate(held):
            earlier = {} if num_new >= self.window_size else self.peaks.get((self.layer, head), {})
            peaks = dict(earlier)
            before = [token for token in tokens if token < position + 1 - self.window_size]
            for row in range(position + 1 - min(num_new, self.window_size), position + 1):
                for query in self.query[head * group : (head + 1) * group, row].double():
                    seen = [token for token in tokens if token <= row]
                    exponentials = [
                        math.exp(float(query @ self.key[head, token].double()) * self.scaling) for token in seen
                    ]
                    given = dict(zip(seen, (each / sum(exponentials) for each in exponentials), strict=True))
                    for token, amount in self.pooled([given[token] for token in before], before):
                        peaks[token] = max(peaks.get(token, 0.0), amount)
            self.peaks[self.layer, head] = peaks

    def pooled(self, given: list[float], tokens: list[int]) -> list[tuple[int, float]]:
        """Means over neighbours, which together are as much as what is given."""
        reach = self.kernel_size // 2
        means = [sum(given[max(index - reach, 0) : index + reach + 1]) for index in range(len(given))]
        return [(token, mean * sum(given) / sum(means)) for token, mean in zip(tokens, means, strict=True)]

    def worth(self, position: int, held: list[list[int]]) -> dict[tuple[int, int], float]:
        worth: dict[tuple[int, int], float] = {}
        before = [[token for token in tokens if not self.is_recent(position, token)] for tokens in held]
        near = position + 1 - 2 * self.window_size
        sums = [
            sum(float(self.attention[head, token]) for token in tokens if token >= near)
            for head, tokens in enumerate(before)
        ]
        near_mass = sum(sums) / len(sums)
        for head, tokens in enumerate(held):
            given = {token: float(self.attention[head, token]) for token in before[head]}
            peaks = {token: max(given[token], self.peaks[self.layer, head].get(token, 0.0)) for token in before[head]}
            mean, mass = sum(peaks.values()) / len(peaks), 0.0
            worth |= {(head, token): math.inf for token in tokens if token not in given}
            for token in before[head]:
                norms = [self.norm(each, token) for each in range(len(held))]
                worth[head, token] = max(peaks[token], mean) * norms[head] / sum(norms)
            for rank, token in enumerate(sorted(given, key=given.get, reverse=True)):
                mass += given[token] / sum(given.values())
                if mass < 0.9 - near_mass and rank < self.kept - (len(tokens) - len(given)):
                    worth[head, token] += 10
        return worth


@pytest.mark.parametrize("ranking", ["head", "layer"])
def test_held_tokens_and_logits_are_those_of_the_reference(ranking: str) -> None:
    model, rows, later = tiny_model("llama"), random_rows((41, 26, 9), seed=3), random_tokens(3, sum(PIECES), seed=4)
    trace = drive(model, DefensiveKVCache(model.config, **SETTINGS, ranking=ranking), rows, later, pieces=PIECES)
    policies = [DefensiveReference(len(row), model, ranking == "layer") for row in rows]
    compare_with_policies(model, trace, rows, policies)


@dataclass
class Unevicted(DefensiveReference):
    """Notes what the tokens of a prompt are worth, by layer."""

    def evict(self, position: int, held: list[list[int]], given: torch.Tensor) -> list[list[int]]:
        super().evict(position, held, given)
        worth = self.worth(position, held)
        self.scores.append([[worth[head, token] for token in tokens] for head, tokens in enumerate(held)])
        return held


def test_layers_keep_what_is_best_of_all() -> None:
    model, rows = tiny_model("llama"), random_rows((41, 26), seed=3)
    trace = drive(model, LayerDefensiveKVCache(model.config, **SETTINGS), rows, random_tokens(2, 0))
    for row, tokens in enumerate(rows):
        policy = Unevicted(len(tokens), model, True)
        policy.scores = []
        run_policy(model, tokens, policy)
        shares = slow_shares(policy.scores, 14)
        assert len(set(shares)) > 1
        for layer, share in enumerate(shares):
            wanted = slow_positions(policy.scores[layer], share)
            assert [trace.held(0, layer, row, head) for head in range(2)] == wanted


@pytest.mark.parametrize("ranking", ["head", "layer", "model"])
def test_every_logit_equals_the_masked_run(ranking: str) -> None:
    model = tiny_model("llama")
    compare_with_masked_dense(model, DefensiveKVCache(model.config, **SETTINGS, ranking=ranking), (23, 41), PIECES)


def test_the_first_stage_by_hand() -> None:
    """Ten tokens in slots of any order, a window of two, one empty slot; the second head may keep one less."""
    positions = torch.tensor([[[3, 0, 1, 2, 5, 4, -1, 7, 6, 9, 8]]], dtype=torch.int32).expand(1, 2, -1)
    attention = torch.zeros(1, 2, 11)
    # At positions 0 to 7; 0.05 and 0.15 right before the window, 0.1 on average.
    by_position = torch.tensor(
        [[0.3, 0.0, 0.15, 0.0, 0.1, 0.1, 0.05, 0.0], [0.1, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.1]]
    )
    is_before = (positions >= 0) & (positions < 8)
    for head in range(2):
        attention[0, head] = by_position[head][positions[0, head].clamp(0, 7).long()]
    length, kept = (torch.tensor([[[number]]], dtype=torch.int32) for number in (10, 8))
    view = ScoringView(None, None, positions, length, None, 0, None, 10, kept, attention, "layer")
    # Up to 0.9 - 0.1 of the mass 0.7. First head: 0.3, 0.45 and 0.55 are below 0.56, 0.65 is not; of the tokens with
    # 0.1, the newer comes first. Second head: up to 0.5, five of the six tokens with 0.1, the newest first.
    chosen = DefensivePolicy(2).first_stage(view, is_before)[0]
    found = [sorted(positions[0, head][chosen[head]].tolist()) for head in range(2)]
    assert found == [[0, 2, 5], [1, 2, 3, 4, 7]]
    view.num_kept = kept - 4  # two of them are the window
    chosen = DefensivePolicy(2).first_stage(view, is_before)[0]
    assert [sorted(positions[0, head][chosen[head]].tolist()) for head in range(2)] == [[0, 2], [4, 7]]


@torch.no_grad()
def test_learned_sinks_are_refused() -> None:
    model = build_model("gpt_oss", attention="eager")
    with pytest.raises(NotImplementedError, match="learned attention sinks .* SnapKVCache"):
        model(random_tokens(1, 20), past_key_values=DefensiveKVCache(model.config, **SETTINGS))


@torch.no_grad()
def test_the_ranking_is_saved(tmp_path: Path) -> None:
    """That of the class as well as another one."""
    model, caches = tiny_model("llama"), (DefensiveKVCache, LayerDefensiveKVCache)
    for cache_class, ranking in itertools.product(caches, ("head", "layer", "model")):
        cache = cache_class(model.config, 16, ranking=ranking)
        model(random_tokens(1, 40), past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        loaded = cache_class.load(tmp_path / "cache.safetensors", model)
        assert [layer.ranking for layer in loaded.layers] == [ranking] * len(loaded.layers)
