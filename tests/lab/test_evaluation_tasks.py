"""The generated tasks: what they are made of, searched for with loops in the decoded text, and how they are scored."""

import hashlib
import itertools
import json
import re
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from text_tokenizers import byte_tokenizer
from transformers import PreTrainedTokenizerBase

from pyramid_cache.lab.cli import main
from pyramid_cache.lab.evaluation.asking import score_answers
from pyramid_cache.lab.evaluation.tasks import (
    TASK_KINDS,
    Context,
    Haystack,
    Question,
    build_contexts,
    haystack,
    list_tasks,
    parse_task,
    parse_tasks,
)
from pyramid_cache.lab.evaluation.tasks.dataset import as_contexts, as_dataset, build_dataset, load_data, save_data
from pyramid_cache.lab.evaluation.tasks.names import num_contexts
from pyramid_cache.lab.novel import PromptError, read_text


CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] | trim }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def novel(monkeypatch: pytest.MonkeyPatch) -> str:
    """The beginning of the novel in place of all of it, which takes seconds to tokenize into bytes."""
    beginning = read_text()[:30_000]
    for module in (haystack, list_tasks):
        monkeypatch.setattr(module, "read_text", lambda: beginning)
    return beginning


def tokenizer(template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerBase:
    made = byte_tokenizer()
    made.chat_template = template
    return made


def build(name: str, samples: int = 3, seed: int = 0, template: str | None = CHAT_TEMPLATE) -> list[Context]:
    return build_contexts(parse_task(name), Haystack(tokenizer(template)), seed, samples)


def decode(ids: list[int]) -> str:
    return byte_tokenizer().decode(ids)


def values_of(question: Question) -> list[str]:
    """What is asked for, without the space that words begin with."""
    spans = question.values or [[0, len(question.answer)]]
    return [decode(question.answer[start:stop]).strip() for start, stop in spans]


def test_recorded_cases_are_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    beginning = read_text()[:20_000]
    monkeypatch.setattr(haystack, "read_text", lambda: beginning)
    template = "{% for message in messages %}[user]{{ message['content'] }}{% endfor %}[model]"
    for contexts, wanted in (
        (build("needles-8-4000", 2, 3, None), "ba45984d8f5ff21a1d0c12732541c839"),
        (build("needles-8-4000", 2, 3, template), "0de9839f2ecaf71ca45bca61c11d4c3a"),
        (build_contexts(parse_task("recall-448"), None, 3, 3), "4ff4e8ca165e1a5fd337114296d7460d"),
    ):
        rows = [[context.ids, [[q.ids, q.answer] for q in context.questions]] for context in contexts]
        assert hashlib.sha256(json.dumps(rows).encode()).hexdigest().startswith(wanted)


def test_contexts_fit_and_depend_on_the_seed_alone(novel: str) -> None:
    lengths = {"common-words": 3000, "needles-multikey": 2500}
    for kind, template in itertools.product(TASK_KINDS.keys() - {"recall"}, (None, CHAT_TEMPLATE)):
        length = lengths.get(kind, 2000)
        (task,) = parse_tasks([kind], [length])
        many, few, other = (build(task.name, *numbers, template) for numbers in ((2, 1), (1, 1), (2, 2)))
        assert many[:1] == few and len({tuple(context.ids) for context in many + other}) == 4
        for context in many:
            assert length * 0.9 < len(context.ids) <= length and context.task == task.name
            text = decode(context.ids)
            assert text.startswith("[user]") == (template is not None and kind != "perplexity")
            assert "[assistant]" not in text
            for turn, question in enumerate(context.questions if kind != "perplexity" else ()):
                asked = decode(question.ids)
                # Nothing of a question comes before its beginning, nothing of an answer after it.
                later = ".[end][user]" if template else ".\n\n"
                assert asked.startswith(later if context.is_conversation and turn else "\n\n")
                assert ("[end][assistant]" if template else "\nAnswer: ") in asked
                assert not asked.endswith(values_of(question)[0])


def test_numbers_are_in_their_context_once_at_their_depth(novel: str) -> None:
    """The right ones: of the person who is asked for, or of several, in the order in which they are asked for."""
    is_in_order = set()
    kinds = ("multikey-20", "multivalue-9", "multiquery-4")
    for name in ("needles-3", *(f"needles-{kind}" for kind in kinds), "turns-4", "passkey"):
        (task,) = parse_tasks([name], [3000])
        for context in build(task.name, 2):
            text = decode(context.ids)
            told = re.findall(r"secret pass number of the (\w+ \w+) is (\d{5})\. ", text)
            persons = [person for person, _ in told]
            assert len(told) == task.count and len(set(persons)) == (min(task.count, 1 if "value" in name else 99))
            if "multikey" in name:
                assert len({word for person in persons for word in person.split()}) < 40  # persons share words
            for question in context.questions:
                asked, numbers = decode(question.ids).split("tioned")[0], values_of(question)
                is_several = task.kind in ("needles-multivalue", "needles-multiquery")
                assert len(set(numbers)) == len(question.depths) == (task.count if is_several else 1)
                is_in_order.add((task.kind, question.depths == sorted(question.depths)))
                wanted = [dict(told).get(person) for person in re.findall(r"the (\w+ \w+)(?= men|,| and)", asked)]
                if task.kind == "needles-multivalue":
                    assert persons[0] in asked
                    wanted = [number for _, number in told]
                assert numbers == wanted or name == "passkey"
                for number, depth in zip(numbers, question.depths, strict=True):
                    assert number.isdecimal() and text.count(number) == 1
                    assert len(number) == (64 if name == "passkey" else 5)
                    # One token is one byte here, and the novel of this test has no others.
                    sentence = text[round(depth * len(context.ids)) :].split("Remember it.")[0]
                    assert sentence.startswith("\n\nThe ") and sentence.endswith(f" is {number}. ")
    assert ("needles-multiquery", False) in is_in_order and ("needles-multivalue", False) not in is_in_order


def test_variables_are_those_that_a_loop_finds(novel: str) -> None:
    for context in build("variables-3000", 2):
        text = decode(context.ids)
        (question,) = context.questions
        asked = re.search(r"assigned the value (\d{5}) in", decode(question.ids))[1]
        values: dict[str, str] = {}
        for name, value in re.findall(r"VAR (\w+) = (\w+(?: \w+)?)\n", text):
            assert name not in values
            values[name] = value if value.isdecimal() else values[value.removeprefix("VAR ")]
        wanted = [name for name, value in values.items() if value == asked]
        assert values_of(question) == wanted and len(wanted) == 5 and len(values) == 10
        for name, depth in zip(wanted, question.depths, strict=True):
            assert text[round(depth * len(context.ids)) :].startswith(f"\n\nVAR {name} = ")


def test_common_words_are_those_that_come_most_often(novel: str) -> None:
    for length, common, others in ((3000, 10, 1), (8000, 30, 3)):
        (context,) = build(f"common-words-{length}", 1)
        text = decode(context.ids)
        listed = re.findall(r"(\d+)\. (\w+)\n", text)
        assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
        counts = Counter(word for _, word in listed)
        (question,) = context.questions
        wanted = []
        for _, word in listed:
            if counts[word] == common and word not in wanted:
                wanted.append(word)
        assert values_of(question) == wanted and len(wanted) == 10
        assert {count for word, count in counts.items() if word not in wanted} == {others}
        for word, depth in zip(wanted, question.depths, strict=True):
            place = round(depth * len(context.ids))
            assert re.match(rf"\d+\. {word}\n", text[place:]) and f" {word}\n" not in text[:place]


def test_a_key_of_a_json_object_has_the_value(novel: str) -> None:
    for context in build("key-value-3000", 3):
        text = decode(context.ids)
        pairs = json.loads(text[text.index("{") :])
        assert 3000 - len(context.ids) < len(f', "{"k" * 36}": "{"v" * 36}"')  # no room for another pair
        (question,) = context.questions
        key = re.search(r'key "([0-9a-f-]{36})"\?.*The value of the key "\1" is "$', decode(question.ids), re.DOTALL)[
            1
        ]
        assert [pairs[key]] == values_of(question)
        assert f'"{key}": "{pairs[key]}"' in text[round(question.depths[0] * len(context.ids)) :][:80]


def test_names_have_lengths_or_get_them() -> None:
    found = parse_tasks(["needles", "needles-8", "variables", "passkey-500", "needles-multikey-200-999"], [1024, 64])
    assert [task.name for task in found] == [
        *("needles-1-1024", "needles-1-64", "needles-8-1024", "needles-8-64", "variables-1024", "variables-64"),
        *("passkey-500", "needles-multikey-200-999"),
    ]
    assert parse_tasks(["variables-64", "variables"], [64]) == [parse_task("variables-64")]
    named = ("turns-8-1024", "turns-1-1024", "passkey-99", "recall-64", "needles-8-4000")
    assert [num_contexts(parse_task(name)) for name in named] == [10, 20, 20, 4, 10]


def test_names_and_lengths_that_cannot_be_are_refused(novel: str) -> None:
    for names, lengths, message in (
        (["needles"], [], "'needles' has no length"),
        (["needles-8"], [], "'needles-8' has no length"),
        (["variables-64"], [128], "has no effect"),
        ([], [], "names no task"),
        (["variables-2-64"], [], "There is no task"),
        (["ruler-4096"], [], "needles-N-L"),
        (["needles-0-4096"], [], "There is no task"),
        (["needles-10-4096"], [], "at most 9 differ"),
        (["needles-multikey-257-64"], [], "N is from 1 to 256"),
        (["needles-multivalue-1-64"], [], "N is from 2 to 9"),
        (["recall"], [63], "even number"),
        (["recall-512"], [], "positions for 510"),
        (["turns-4-08"], [], "There is no task"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_tasks(names, lengths)
    for name, message in (
        ("needles-8-300", "8 hidden texts and the frame take"),
        ("passkey-100000", "the text has 30000"),
        ("common-words-500", "no room for 10 words 10 times each"),
        ("frequent-words-200", "no room for frequencies that differ"),
        ("key-value-200", "no room for 2 pairs"),
        ("perplexity-30000", "129 come behind"),
    ):
        with pytest.raises(PromptError, match=message):
            build(name)


def test_values_are_found_or_not() -> None:
    """The third of six tokens is a separator: two values of two tokens, of which one is found, and one of one."""
    logits = torch.full((1, 6, 4), -1.0)
    for place, said_token in enumerate([0, 1, 3, 2, 3, 1]):
        logits[0, place, said_token] = 2.0
    answers = torch.tensor([[0, 1, 2, 2, 0, 1]])
    (score,) = score_answers(logits, answers, [[[0, 2], [3, 5], [5, 6]]])
    likely = logits.log_softmax(-1)
    wanted = sum(likely[0, place, answers[0, place]].item() for place in (0, 1, 3, 4, 5)) / 5
    assert score.token_accuracy == pytest.approx(2 / 3) and not score.is_exact
    assert score.log_likelihood == pytest.approx(wanted)
    (plain,) = score_answers(logits, answers)
    assert plain.token_accuracy == pytest.approx(4 / 6)
    assert score_answers(logits, answers, [[]]) == [plain]


NAMES = ("needles-multivalue-3-2000", "turns-2-2000", "perplexity-500", "variables-2000")


def test_columns_hold_what_contexts_do_and_come_back(novel: str, tmp_path: Path) -> None:
    decode = byte_tokenizer().decode
    for name in NAMES:
        contexts = build(name, 2, 5)
        dataset = build_dataset(name, tokenizer(), seed=5, samples=2)
        assert as_contexts(dataset) == contexts
        for index, (row, context) in enumerate(zip(dataset, contexts, strict=True)):
            assert (row["task"], row["seed"], row["index"]) == (name, 5, index)
            assert row["text"] == decode(context.ids) and row["input_ids"] == context.ids
            for number, question in enumerate(context.questions):
                assert row["question_texts"][number] == decode(question.ids)
                assert row["answer_texts"][number] == decode(question.answer)
                assert (row["depths"][number], row["values"][number]) == (question.depths, question.values)
        save_data(contexts, tmp_path, tokenizer(), seed=5)
    for name in NAMES:
        for samples in (2, 1):
            assert load_data(tmp_path, name, tokenizer(), 5, samples) == build(name, samples, 5)
    pairs = build_dataset("recall-64", samples=2)  # of the recall model, which has no text
    assert pairs["text"] == ["", ""] and as_contexts(pairs) == build_contexts(parse_task("recall-64"), samples=2)


def test_data_of_something_else_is_refused(novel: str, tmp_path: Path) -> None:
    save_data(build("variables-2000", 2, 1), tmp_path, tokenizer(), seed=1)
    for arguments, message in (
        (("variables-1000", tokenizer(), 1), "no contexts of the task 'variables-1000'. It has variables-2000"),
        (("variables-2000", tokenizer(), 1, 3), "has 2 contexts, not 3"),
        (("variables-2000", tokenizer(), 2), "from seed 1, not 2"),
        (("variables-2000", ShiftedTokenizer(), 1), "another tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            load_data(tmp_path, *arguments)
    with pytest.raises(ValueError, match="need a tokenizer"):
        build_dataset("variables-2000")
    with pytest.raises(ValueError, match="It has none"):
        load_data(tmp_path / "nowhere", "variables-2000", tokenizer())
    with pytest.raises(ValueError, match="has no columns task: "):
        as_contexts(as_dataset(build("variables-2000", 1)).remove_columns("task"))


class ShiftedTokenizer:
    """Has another text for each token."""

    def decode(self, ids: list[int]) -> str:
        return byte_tokenizer().decode([(token + 1) % 256 for token in ids])


def test_the_command_saves_data_and_takes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, cases, figures = tmp_path / "data", tmp_path / "cases.json", tmp_path / "figures.json"
    chosen = ["eval", "--tasks", "recall", "--lengths", "64,66", "--samples", "2", "--seed", "3"]
    assert main([*chosen, "--save-data", str(data)]) == main([*chosen, "--save-cases", str(cases)]) == 0
    assert sorted(path.name for path in data.iterdir()) == ["recall-64", "recall-66"]
    contexts = [build_contexts(parse_task(name), None, 3, 2) for name in ("recall-64", "recall-66")]
    assert json.loads(cases.read_text()) == {"model": "recall model", "contexts": list(map(asdict, sum(contexts, [])))}
    measured = [*chosen, "--caches", "knorm", "--budgets", "0.5", "--json", str(figures)]
    records = []
    for more in ([], ["--data", str(data)]):
        assert main([*measured, *more]) == 0
        records.append(json.loads(figures.read_text()))
    assert records[0]["rows"] == records[1]["rows"] and f"--data {data}" in records[1]["command"]
    monkeypatch.setitem(sys.modules, "datasets", None)
    for more, status, message in (
        (["--seed", "4", "--data", str(data)], 1, "pip install 'pyramid_cache[eval]'"),
        (["--data", str(data), "--save-data", str(data)], 2, "give one of the two"),
    ):
        assert main([*chosen, *more]) == status
        assert message in capsys.readouterr().err.replace("\n", " ")


def test_what_cannot_be_measured_is_refused_before_anything_is(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Contexts that are too long for the model, though those of the recall model come first."""
    limit = json.loads((model_folder / "config.json").read_text())["max_position_embeddings"]
    command = f"eval --model {model_folder} --samples 1 --tasks recall-64,perplexity-{limit} --out {tmp_path}"
    assert main(command.split()) == 2
    assert f"exceed the {limit} positions" in capsys.readouterr().err
    assert not list(tmp_path.glob("cells*.jsonl"))
