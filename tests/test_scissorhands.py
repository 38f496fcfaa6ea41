"""ScissorhandsCache against counts that are written as loops, and on attention that can be worked out by hand."""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from models import FAMILIES, Trace, drive, random_rows, random_tokens, tiny_model
from reference import attend_one, choose, compare_with_policies
from synthetic import SyntheticModel
from test_compile import Steps, check_one_graph

from pyramid_cache import PolicyCache, ScissorhandsCache
from pyramid_cache.caches.scissorhands import ScissorhandsPolicy
from pyramid_cache.engine import scoring


# Rows of 23, 41 and 32 tokens, then 40 single ones and two turns of several.
LENGTHS, PIECES = (23, 41, 32), [1] * 10 + [9] + [1] * 12 + [3] + [1] * 18


@dataclass
class CountedQueries:
    """
    To how many of the last queries each held key was important, query by query; `run_policy` and
    `compare_with_policies` of reference.py say how it is run. `held` is filled for each token.
    """

    pieces: list[int]  # tokens of each forward pass, the prompt first
    trace: Trace
    row: int
    window_size: int
    num_recent: int
    budget: int
    eviction_interval: int
    follows: bool = False  # whether it goes along with all that `trace` held
    held: dict[int, list[list[list[int]]]] = field(default_factory=dict, init=False)
    shares: dict[int, list[dict[int, float]]] = field(default_factory=dict, init=False)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        kv_heads, length, head_dim = key.shape
        groups = query.view(kv_heads, -1, length, head_dim)
        output, shares = torch.zeros_like(groups), [{} for _ in range(kv_heads)]
        self.held[layer] = [[] for _ in range(kv_heads)]
        for head, history in enumerate(self.held[layer]):
            held: list[int] = []
            end, share = 0, shares[head]
            for step, piece in enumerate(self.pieces):
                start, end = end, end + piece
                counts = dict.fromkeys([*held, *range(start, end)], 0)
                for position in range(start, end):
                    seen = [*held, *range(start, position + 1)]
                    output[head, :, position], probabilities = attend_one(
                        groups[head, :, position], key[head, seen], value[head, seen], scaling
                    )
                    if position >= end - self.window_size:
                        for token, probability in zip(seen, probabilities.mean(dim=0).tolist(), strict=True):
                            counts[token] += probability >= 1 / len(seen)
                share_left = 1 - min(piece, self.window_size) / self.window_size
                for token, count in counts.items():
                    share[token] = share_left * share.get(token, 0.0) + count / self.window_size
                held = self.kept([*counts], share, step, layer, head, end)
                history += [held] * (piece if step else 1)
        self.shares[layer] = shares
        return output.view_as(query)

    def kept(self, tokens: list[int], share: dict[int, float], step: int, layer: int, head: int, length: int) -> list:
        observed = self.trace.held(step, layer, self.row, head)
        num_spare = self.eviction_interval - 1 if step and self.pieces[step] == 1 else 0
        if self.follows or len(tokens) <= self.budget + num_spare:
            return observed if self.follows else tokens
        first_recent = length - min(self.num_recent, self.budget // 2)
        scores = {token: math.inf if token >= first_recent else share[token] for token in tokens}
        return sorted(choose(scores, self.budget, set(observed)))


def check(family: str, cache: PolicyCache, follows: bool = False) -> None:
    """What is held, the logits, and the shares of the tokens that are held in the end, of each row alone."""
    model, rows = tiny_model(family), random_rows(LENGTHS, seed=5)
    trace = drive(model, cache, rows, random_tokens(len(rows), sum(PIECES), seed=6), pieces=PIECES)
    policy, interval = cache.policy, cache.layers[0].eviction_interval
    settings = (policy.window_size, policy.num_recent, 12, interval, follows)
    policies = [CountedQueries([len(tokens), *PIECES], trace, row, *settings) for row, tokens in enumerate(rows)]
    compare_with_policies(model, trace, rows, policies)
    for row, counted in enumerate(policies):
        for index, layer in enumerate(cache.layers):
            positions, found = layer.held_positions()[row], layer.store.held_attention()[row]
            for head, share in enumerate(counted.shares[index]):
                is_held = positions[head] >= 0
                wanted = torch.tensor([share[token] for token in positions[head, is_held].tolist()])
                torch.testing.assert_close(found[head, is_held], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window_size, num_recent, interval", [(8, 3, 3), (32, 10, 1)])
def test_counts_of_the_last_queries(
    window_size: int, num_recent: int, interval: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of padded rows, prompts longer and shorter than the window, later turns and answers; some queries at a time."""
    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", 1500)
    settings = {"window_size": window_size, "num_recent": num_recent, "eviction_interval": interval}
    check("llama", ScissorhandsCache(tiny_model("llama").config, 12, **settings))


@pytest.mark.parametrize("ranking", ["layer", "model-online"])
def test_counts_where_heads_compete(ranking: str) -> None:
    policy = ScissorhandsPolicy(window_size=8, num_recent=3)
    check("llama", PolicyCache(tiny_model("llama").config, 12, policy, eviction_interval=3, ranking=ranking), True)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_of_other_families(family: str) -> None:
    for window_size, interval in ((16, 1), (64, 5)):
        config = tiny_model(family).config
        check(family, ScissorhandsCache(config, 12, window_size=window_size, eviction_interval=interval))


def test_counts_by_hand() -> None:
    """
    Attention in proportion to a weight of each key. The last four of six queries find important: key 0 all four, key 3
    the three that see it, key 5 its own (2.2 of 12.2 is more than a sixth). Of the others the latest stays.

    The next query sees five keys, with weights of 11.2: to it keys 0 and 3 are important, and 2.2 is too little. It
    takes over a quarter of the window.
    """
    model = SyntheticModel(1, 2, 2, 4)
    cache = ScissorhandsCache(model.config, 4, window_size=4, num_recent=1, eviction_interval=1)
    key = torch.zeros(1, 2, 7, 4)
    key[..., 0] = torch.tensor([4.0, 1, 1, 3, 1, 2.2, 1]).log() / model.scaling
    held = []
    for piece in key.split([6, 1], dim=2):
        query = torch.zeros(1, 4, piece.shape[2], 4)
        query[..., 0] = 1.0
        model.run_layer(cache, 0, query, piece, torch.ones_like(piece), None)
        state = cache.layers[0].state
        pairs = zip(state.positions[0, 1].tolist(), state.attention[0, 1].tolist(), strict=True)
        held.append({position: share for position, share in pairs if position >= 0})
    assert held == [{0: 1.0, 3: 0.75, 4: 0.0, 5: 0.25}, {0: 1.0, 3: 0.8125, 5: 0.1875, 6: 0.0}]


def test_the_mean_over_a_group_counts() -> None:
    """Key 1 has 0.4 of one query head and 0.9 of the other, key 0 the rest: only key 1 has half on average."""
    model = SyntheticModel(1, 1, 2, 4)
    cache = ScissorhandsCache(model.config, 2, window_size=1)
    key, query = torch.eye(4)[None, None, :2], torch.zeros(1, 2, 2, 4)
    query[0, :, 1, 0], query[0, :, 1, 1] = torch.tensor([0.6, 0.1]).log(), torch.tensor([0.4, 0.9]).log()
    model.run_layer(cache, 0, query / model.scaling, key, torch.ones_like(key), None)
    assert cache.layers[0].state.attention.tolist() == [[[0.0, 1.0]]]


@pytest.mark.parametrize("ranking", ["head", "layer"])
def test_steps_of_fixed_shapes(ranking: str) -> None:
    """They count as others do, whatever has been evicted."""
    model, policy = tiny_model("llama"), ScissorhandsPolicy(window_size=8, num_recent=3)
    for interval, lengths in ((1, (40, 40)), (3, (23, 41)), (3, (2, 9))):
        settings = {"eviction_interval": interval, "ranking": ranking}
        fixed, plain = (Steps(model, PolicyCache(model.config, 12, policy, **settings), lengths) for _ in range(2))
        fixed.cache.step(max_length=200)
        for tokens in random_tokens(30, 2, 1, seed=4):
            torch.testing.assert_close(fixed.feed(tokens), plain.feed(tokens), atol=1e-4, rtol=0)
            fixed.cache.step()
        for index in range(3):
            assert torch.equal(*(run.cache.positions(index).sort().values for run in (fixed, plain)))


@pytest.mark.slow
@pytest.mark.parametrize("interval", [1, 3])
def test_compiled_steps_where_heads_compete(interval: int) -> None:
    """As test_compile.py has it for `ScissorhandsCache` itself."""
    policy, settings = ScissorhandsPolicy(8, 3), {"eviction_interval": interval, "ranking": "layer"}
    case = SimpleNamespace(build=lambda model, budget: PolicyCache(model.config, 12, policy, **settings))
    check_one_graph(case, "inductor")
