"""
examples/lm_eval_harness.py: with a budget that holds everything it is HFLM, with a small one what the cache's
reference says.
"""

import json
from functools import cache as remember
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Trace, build_model, random_tokens
from pages import import_example, run_example
from reference import MaskPolicy, masks_of, run_policy
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from pyramid_cache import H2OCache, SnapKVCache


lm_eval = pytest.importorskip("lm_eval")
harness = import_example("lm_eval_harness")
VOCABULARY = {f"w{index:03}": index for index in range(101)}


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a word, w000 to w100: none begins another, as stop strings need it."""
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="w002"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="w001", pad_token="w000", unk_token="w002", model_max_length=512
    )


@remember
def small_model() -> PreTrainedModel:
    """A tiny model that ends with w001."""
    model = build_model("llama", seed=3)
    model.generation_config.eos_token_id = VOCABULARY["w001"]
    return model


def cache_model(build: Any, held_back: int = 1) -> Any:
    return harness.CacheLM(small_model(), build, held_back, tokenizer=tokenizer(), batch_size=2)


@pytest.mark.parametrize("held_back", [1, 6])
def test_continuations_are_read_in_view_of_what_is_kept(held_back: int) -> None:
    """An uncached run whose masks hide what the cache has evicted of the context, from what was held back on."""
    model = small_model()
    context, choices = random_tokens(40).tolist(), [random_tokens(n, seed=n).tolist() for n in (1, 4, 4, 7)]
    choices[2] = choices[1][:3] + [5]

    def build(model: Any) -> SnapKVCache:
        return SnapKVCache(model.config, budget=14, window_size=4)

    requests = [(None, context, choice) for choice in choices]
    found = cache_model(build, held_back)._loglikelihood_tokens(requests, disable_tqdm=True)
    num_read, cache = 40 - held_back, build(model)
    with torch.no_grad():
        model(torch.tensor([context[:num_read]]), past_key_values=cache)
    positions = [layer.held_positions() for layer in cache.compressed_layers]
    assert all((held >= 0).sum(dim=-1).tolist() == [[14, 14]] for held in positions)
    for choice, (score, _) in zip(choices, found, strict=True):
        piece = held_back + len(choice) - 1
        trace = Trace(torch.empty(0), [positions], torch.empty(0), [num_read], [piece])
        tokens = torch.tensor(context + choice[:-1])
        with torch.no_grad():
            logits = run_policy(model, tokens, MaskPolicy(masks_of(trace, 0, 2)))[39:].log_softmax(dim=-1)
        wanted = sum(float(row[token]) for row, token in zip(logits, choice, strict=True))
        assert score == pytest.approx(wanted, abs=1e-4)


# One task of each public set: the harness's own definition, its splits, and a row of the published columns.
PUBLIC: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "gsm8k": ("gsm8k/gsm8k", ("train", "test"), {"question": "What are 3 times 400?", "answer": "#### 1,200"}),
    "longbench_hotpotqa": (
        *("longbench/hotpotqa", ("test",)),
        {"question": "Who wrote it?", "context": "Jane wrote it.", "answers": ["Jane"], "all_classes": None},
    ),
    "longbench2_govt_single": (
        *("longbench2/govt_single_doc", ("train",)),
        {"question": "Which?", "context": "It is three.", "choices": ["one", "two", "three", "four"], "answer": "C"},
    ),
    "infinitebench_kv_retrieval": (
        *("infinitebench/infinitebench_kv_retrieval", ("kv_retrieval",)),
        {"id": 1, "context": '{"k": "v-1"}', "input": 'Key: "k"', "answer": ["v-1"], "options": []},
    ),
}
# The harness makes RULER's contexts. Its YAML files import a list of six million words and fetch data of nltk, which
# the tracking of variables does not need.
RULER_FUNCTIONS = """
from lm_eval.tasks.ruler.common_utils import aggregate_metrics, process_results
from lm_eval.tasks.ruler.vt_utils import get_vt_dataset
"""
RULER_METRIC = "{metric: '%s', aggregation: !function ruler_functions.aggregate_metrics, higher_is_better: true}"
RULER = f"""
task: local_ruler_vt
dataset_path: ""
output_type: generate_until
test_split: test
custom_dataset: !function ruler_functions.get_vt_dataset
doc_to_text: "{{{{input}}}}"
doc_to_target: "{{{{outputs}}}}"
gen_prefix: "{{{{gen_prefix}}}}"
process_results: !function ruler_functions.process_results
metric_list: [{RULER_METRIC % 4096}, {RULER_METRIC % 1000}]
generation_kwargs: {{do_sample: false, max_gen_toks: 30, until: []}}
"""


def public_tasks(folder: Path) -> tuple[list[str], Any]:
    """The names of one task of each public set, and the manager that knows them."""
    (folder / "tokenizer").mkdir()
    tokenizer().save_pretrained(folder / "tokenizer")
    for name, (definition, splits, row) in PUBLIC.items():
        asked = "input" if "input" in row else "question"
        known = " ".join(f"w{index:03}" for index in random_tokens(40).tolist())  # the tokenizer knows no others
        rows = [row, {**row, asked: known}]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        files = {"data_files": dict.fromkeys(splits, str(folder / f"{name}.jsonl"))}
        settings = {"include": str(Path(lm_eval.__file__).parent / "tasks" / f"{definition}.yaml")}
        settings |= {"task": f"local_{name}", "dataset_path": "json", "dataset_name": None}
        settings["dataset_kwargs"] = files | {"cache_dir": str(folder / "datasets")}
        (folder / f"{name}.yaml").write_text(json.dumps(settings))  # which is YAML as well
    (folder / "ruler_functions.py").write_text(RULER_FUNCTIONS)
    (folder / "ruler.yaml").write_text(RULER)
    metadata = {"tokenizer": str(folder / "tokenizer"), "max_seq_lengths": [1000]}
    names = ["local_ruler_vt", *(f"local_{name}" for name in PUBLIC)]
    return names, harness.TaskManager(include_path=str(folder), include_defaults=False, metadata=metadata)


def test_public_sets_run_with_any_cache(tmp_path: Path) -> None:
    """
    Answers of each set are those of `generate` with the same small cache. With a budget that holds everything, answers
    and scores of two rows of each set are those of HFLM.
    """
    names, manager = public_tasks(tmp_path)
    model, words_of = small_model(), tokenizer()
    settings = {"tasks": names, "task_manager": manager, "limit": 2, "num_fewshot": 0, "bootstrap_iters": 0}

    def build(model: PreTrainedModel) -> SnapKVCache:
        return SnapKVCache(model.config, budget=20, window_size=4)

    adapter = cache_model(build)
    results = lm_eval.simple_evaluate(model=adapter, **settings)
    assert set(results["results"]) == set(names)
    for name in names:
        (sample, *_) = results["samples"][name]
        prompt, asked = sample["arguments"][0]
        if isinstance(asked, str):  # a letter
            assert len(sample["resps"]) == 4 and 0 <= results["results"][name]["acc,none"] <= 1
            continue
        num_new = asked.get("max_gen_toks", adapter.max_gen_toks)
        ids = words_of(prompt, return_tensors="pt")["input_ids"][:, -(adapter.max_length - num_new) :]
        wanted = model.generate(ids, past_key_values=build(model), max_new_tokens=num_new, do_sample=False)
        text = words_of.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)
        assert sample["resps"][0][0].split() == text.split()

    plain = harness.HFLM(model, backend="causal", tokenizer=words_of, batch_size=2)
    samples = lm_eval.simple_evaluate(model=plain, **settings)["samples"]
    for build_large in (
        lambda model: SnapKVCache(model.config, budget=1.0),
        lambda model: DynamicCache(config=model.config),
    ):
        found = lm_eval.simple_evaluate(model=cache_model(build_large, held_back=3), **settings)["samples"]
        for name, sample in ((name, sample) for name in names for sample in range(2)):
            answers = [[answer for (answer,) in which[name][sample]["resps"]] for which in (found, samples)]
            if isinstance(answers[0][0], str):
                assert answers[0] == answers[1]
                continue
            scores, greedy = zip(*answers[0], strict=True)
            wanted_scores, wanted_greedy = zip(*answers[1], strict=True)
            assert scores == pytest.approx(wanted_scores, abs=1e-4) and greedy == wanted_greedy


def test_contexts_of_one_token_and_too_long_ones_and_what_is_refused() -> None:
    model = small_model()
    language_model = cache_model(lambda model: H2OCache(model.config, budget=8))
    language_model._max_length = 20
    context, target = random_tokens(30).tolist(), random_tokens(4, seed=1).tolist()
    requests = [(None, ids, target) for ids in (context, context[-17:], context[:1])]
    long, cut, short = language_model._loglikelihood_tokens(requests, disable_tqdm=True)
    assert long == cut
    with torch.no_grad():
        logits = model(torch.tensor([[context[0], *target[:-1]]])).logits[0].log_softmax(dim=-1)
    assert short[0] == pytest.approx(float(logits.gather(-1, torch.tensor(target)[:, None]).sum()), abs=1e-4)
    with pytest.raises(NotImplementedError, match="no context that could be compressed"):
        language_model.loglikelihood_rolling([])
    assert cache_model(lambda model: DynamicCache(config=model.config)).loglikelihood_rolling([]) == []
    with pytest.raises(ValueError, match="`num_held_back=0` must be an integer of at least 1"):
        cache_model(None, held_back=0)


@pytest.mark.slow
def test_runs_as_a_script(tmp_path: Path) -> None:
    public_tasks(tmp_path)
    (tmp_path / "ruler.yaml").unlink()
    name, record = "local_longbench2_govt_single", tmp_path / "found.json"
    arguments = ["--tasks", name, "--include-path", tmp_path, "--json", record, "--cache", "TOVACache", "--budget", 64]
    assert name in run_example("lm_eval_harness.py", *arguments, cwd=tmp_path).stdout
    assert 0 <= json.loads(record.read_text())["results"][name]["acc,none"] <= 1
