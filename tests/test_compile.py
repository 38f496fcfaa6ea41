"""`torch.compile` of a model's forward: decoding in one graph, without a new one at each step."""

from typing import Any

import pytest
import torch
from caches import QUICK_CASES, CacheCase, parametrize_cases
from models import build_model, left_pad, random_rows, random_tokens
from torch._dynamo.utils import counters
from transformers import Cache, PreTrainedModel


class Decoding:
    """A model and what it decodes with, one token per row at a time."""

    def __init__(self, model: PreTrainedModel, cache: Cache, lengths: tuple[int, ...]) -> None:
        self.cache = cache
        input_ids, self.mask = (tensor.to(model.device) for tensor in left_pad(random_rows(lengths)))
        self.is_padded = len(set(lengths)) > 1
        self.step(model, input_ids)

    @torch.no_grad()
    def step(self, model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, vocabulary)` of the last of some more tokens."""
        if self.cache.get_seq_length():
            self.mask = torch.cat([self.mask, torch.ones_like(input_ids)], dim=1)
        position_ids = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        mask = self.mask if self.is_padded else None
        output = model(input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=self.cache)
        return output.logits[:, -1]


def compare(
    case: CacheCase,
    budget: str,
    lengths: tuple[int, ...],
    backend: str,
    steps: int,
    device: str = "cpu",
    **options: Any,
) -> list[int]:
    """
    Decode compiled and not, and return the number of graphs after each step. In the end a cache that another model
    has filled is refused in compiled code too.
    """
    torch._dynamo.reset()
    counters.clear()
    model = build_model("llama", num_hidden_layers=2).to(device)
    compiled = torch.compile(model, backend=backend, fullgraph=case.has_one_graph, **options)
    one, other = (Decoding(model, case.build(model, budget), lengths) for _ in range(2))
    graphs = []
    for tokens in random_tokens(steps, len(lengths), 1, seed=2).to(device):
        output, wanted = one.step(compiled, tokens), other.step(model, tokens)
        graphs.append(counters["stats"]["unique_graphs"])
        # transformers' sdpa repeats keys for compilers where it groups queries otherwise.
        tolerance = 1e-5 if backend == "eager" else 1e-4
        torch.testing.assert_close(output, wanted, atol=tolerance, rtol=0)
    for layer in range(len(one.cache.layers)):
        assert torch.equal(one.cache.positions(layer), other.cache.positions(layer))
    assert one.cache.num_kept_tokens() == other.cache.num_kept_tokens()
    assert one.cache.get_seq_length() == other.cache.get_seq_length()
    stranger = build_model("llama", num_hidden_layers=2, seed=1).to(device)
    foreign = Decoding(stranger, case.build(stranger, budget), lengths)
    with pytest.raises(Exception, match="filled by another model"):
        foreign.step(compiled, tokens)
    return graphs


@parametrize_cases(case for case in QUICK_CASES if case.short_name in ("h2o", "streaming"))
def test_a_padded_batch_decodes_in_one_graph(case: CacheCase) -> None:
    """One graph while numbers are taken for constants, and one for all the steps that follow."""
    graphs = compare(case, "tight", (23, 40), "eager", 40)
    assert graphs[0] == 1 and graphs[20] == graphs[-1] <= 4


# A budget, lengths of prompts, a backend, a number of steps, and the step from which on there is no new graph.
RUNS = [
    ("tight", (5, 40), "eager", 40, 20),
    # It grows by sixteen tokens at a time: one graph for the steps in which it does, one for the others.
    ("large", (40, 40), "eager", 60, 35),
    ("tight", (23, 40), "inductor", 30, 15),
]


@pytest.mark.slow
@parametrize_cases(QUICK_CASES)
def test_every_kind_of_layer(case: CacheCase) -> None:
    """Where sizes change with every zone of the answer, or with every token, there are graph breaks."""
    for budget, lengths, backend, steps, settled in RUNS if case.has_one_graph else RUNS[:1]:
        graphs = compare(case, budget, lengths, backend, steps)
        assert not case.has_one_graph or (graphs[0] == 1 and graphs[settled] == graphs[-1] <= 4)
