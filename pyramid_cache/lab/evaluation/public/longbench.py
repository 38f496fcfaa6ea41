"""
LongBench (arXiv 2308.14508): the hub's THUDM/LongBench with a configuration for each set, or a line-by-line file of one or more.

Columns, after the "data format" of github.com/THUDM/LongBench: `input` (the question, if the set has one), `context`, `answers` (list of
right answers), `dataset` (which set), `all_classes` (of the classification sets; else null) and `language`. Metrics are those of its
`eval.py`, lengths of answers those of its `config/dataset2maxlen.json`. The instructions here are in other words than those of
`config/dataset2prompt.json`; sets of examples and of code go without the chat template, as there.

Newer versions of `datasets` read no set that comes as a script: download `data.zip` from the hub's page, and give the file.
"""

from typing import Any, NamedTuple

from pyramid_cache.lab.evaluation.public.example import Example


COLUMNS = ("input", "context", "answers", "dataset")
SPLIT = "test"


class Set(NamedTuple):
    """How the questions of one set are asked: what comes before the context and behind it, and whether by chat."""

    metric: str
    max_new_tokens: int
    before: str
    behind: str
    is_chat: bool = True


BRIEF = "Answer with a few words, and do not explain.\n\nQuestion: {input}\nAnswer:"
PASSAGES = "Answer a question about these passages.\n\n"
NEXT_LINE = "\nThe next line of code:\n"
SETS = {
    "narrativeqa": Set("word_f1", 128, "Answer a question about this story.\n\n", BRIEF),
    "qasper": Set(
        "word_f1",
        128,
        "Answer a question about this article.\n\n",
        'Answer with a few words, with "yes" or "no", or with "unanswerable" if the article does not say. Do not explain.\n\n'
        "Question: {input}\nAnswer:",
    ),
    "multifieldqa_en": Set("word_f1", 64, "Answer a question about this text.\n\n", BRIEF),
    "hotpotqa": Set("word_f1", 32, PASSAGES, BRIEF),
    "2wikimqa": Set("word_f1", 32, PASSAGES, BRIEF),
    "musique": Set("word_f1", 32, PASSAGES, BRIEF),
    "gov_report": Set(
        "rouge_l", 512, "Here is a report of a government agency.\n\n", "Summarize it on one page.\n\nSummary:"
    ),
    "qmsum": Set("rouge_l", 512, "Here is the transcript of a meeting.\n\n", "{input}\nAnswer in a few sentences:"),
    "multi_news": Set(
        "rouge_l", 512, "Here are several pieces of news.\n\n", "Summarize them on one page.\n\nSummary:"
    ),
    "trec": Set("classification", 64, "Find the type of a question, as in these examples.\n\n", "\n{input}", False),
    "triviaqa": Set(
        "word_f1_of_first_line", 32, "Answer from the passage, as in these examples.\n\n", "\n\n{input}", False
    ),
    "samsum": Set(
        "rouge_l_of_first_line", 128, "Summarize the dialogue, as in these examples.\n\n", "\n\n{input}", False
    ),
    "lsht": Set("classification", 64, "请判断新闻的类别，例如：\n\n", "\n{input}", False),
    "passage_count": Set(
        "right_numbers",
        32,
        "Some of these paragraphs are the same. Count the different ones.\n\n",
        "How many different paragraphs are there? Answer with the number.",
    ),
    "passage_retrieval_en": Set(
        "right_numbers",
        32,
        "Here are 30 paragraphs. Find the one that is summarized at the end.\n\n",
        'This is the summary:\n\n{input}\n\nAnswer with the paragraph that it is of, such as "Paragraph 1".',
    ),
    "passage_retrieval_zh": Set(
        "right_numbers",
        32,
        "以下是若干段落，请找出最后的摘要属于哪一段。\n\n",
        '摘要：\n\n{input}\n\n请回答段落编号，例如"段落1"。',
    ),
    "lcc": Set("code_similarity", 64, "Complete this code.\n\n", NEXT_LINE, False),
    "repobench-p": Set("code_similarity", 64, "Complete this code.\n\n", f"{{input}}{NEXT_LINE}", False),
}
# Their metrics count words that a Chinese word segmenter finds.
UNSUPPORTED = ("multifieldqa_zh", "dureader", "vcsum")


def read(row: dict[str, Any], name: str) -> Example:
    """The example of a row."""
    which = row["dataset"].removesuffix("_e")  # LongBench-E
    if which in UNSUPPORTED:
        raise NotImplementedError(
            f"the set {which!r} is scored by the words of a Chinese segmenter, which is not supported. Take another set"
        )
    if which not in SETS:
        raise ValueError(f"there is no set {which!r}. Sets are {', '.join(SETS)}")
    found = SETS[which]
    return Example(
        found.before + row["context"],
        # Not a format string: braces in a question are text.
        found.behind.replace("{input}", row["input"]),
        row["answers"][0],
        list(row["answers"]),
        found.metric,
        found.max_new_tokens,
        choices=list(row.get("all_classes") or []),
        is_chat=found.is_chat,
    )
