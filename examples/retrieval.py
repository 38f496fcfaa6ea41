"""Ask questions about a document that is read once. Its compressed cache is saved, and loaded for later questions.

    python examples/retrieval.py --prefix novel.safetensors "Who is Mr. Bingley?" "What is the name of the house?"
    python examples/retrieval.py --prefix novel.safetensors "Who has five daughters?"

The first command reads the document, compresses its cache, saves that and answers. Later commands load the file. A
copy of the cache answers each question, so no question sees another one.

`cache.load` refuses a file that is damaged or was made by another model. It cannot know which document the file is
from. So this script writes a second file that ends in `.json`, with the document and the options of the cache. It
refuses a prefix of another document or with other options. The default document is the beginning of a novel that comes
with the package. The default model is too small to answer well with any cache.
"""

import argparse
import copy
import json
import time
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import torch
from script_options import CACHE_CLASSES, add_cache_options, add_model_options, load_model, new_cache, num_kept, run
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyramid_cache.engine.architectures import CACHE_ARGUMENT
from pyramid_cache.engine.cache import CompressedCache
from pyramid_cache.lab.novel import frame, read_text
from pyramid_cache.lab.terminal import check_output, positive_int
from pyramid_cache.lab.weights import sha256 as sha256_of_file


DEFAULT_QUESTIONS = ("Who has taken Netherfield Park?", "How many daughters does Mr. Bennet have?")


@dataclass(frozen=True)
class PrefixRecord:
    """Describes the file with the cache of a document."""

    document: str  # SHA-256 of the token ids
    cache: str  # the name of its class
    options: str  # the arguments that the class was given
    file: str  # SHA-256 of the file, so that no other file is taken for this one
    seconds_to_read: float  # how long the document took to be read and compressed

    @staticmethod
    def path(prefix: Path) -> Path:
        return prefix.with_name(f"{prefix.name}.json")

    def require_same(self, prefix: Path, found: "PrefixRecord") -> None:
        """
        Raises unless the file is what is wanted.

        Args:
            found (`PrefixRecord`): What is written beside the file.

        Raises:
            ValueError: The file differs; the message says in what.
        """
        for name, what in (
            ("document", "of another document, or of more or less of it"),
            ("cache", f"a {found.cache}, not a {self.cache}"),
            ("options", f"a {found.cache} with {found.options}, not with {self.options}"),
            ("file", f"not the one that {self.path(prefix).name} is about"),
        ):
            if getattr(self, name) != getattr(found, name):
                raise ValueError(f"{prefix} is {what}. Name another file, or delete both to read the document again.")


def digest(ids: list[int]) -> str:
    """SHA-256 of token ids."""
    return sha256(json.dumps(ids).encode()).hexdigest()


@torch.no_grad()
def read_document(model: PreTrainedModel, cache: CompressedCache, ids: list[int]) -> None:
    """Lets the cache see a document, and compresses what it holds."""
    model(torch.tensor([ids], device=model.device), **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
    cache.compress()


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: CompressedCache,
    question: str,
    max_new_tokens: int,
) -> str:
    """
    Answers a question with a copy of the cache, which stays as it is.

    `generate` is given the new tokens and a mask over everything seen. It does not need the document itself.
    """
    cache = copy.deepcopy(cache)
    _, question_ids = frame(tokenizer, f"\n\n{question}")
    input_ids = torch.tensor([question_ids], device=model.device)
    mask = input_ids.new_ones(1, cache.get_seq_length() + input_ids.shape[1])
    output = model.generate(input_ids, attention_mask=mask, **{CACHE_ARGUMENT: cache}, max_new_tokens=max_new_tokens)
    return tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True).strip()


def prefix_of(model: PreTrainedModel, options: argparse.Namespace, ids: list[int]) -> CompressedCache:
    """The cache of the document: from the file if there is one, else read, compressed and saved there."""
    cache = new_cache(options, model)
    if not isinstance(cache, CompressedCache):
        raise ValueError(f"{options.cache} cannot be saved. Choose one of {', '.join(CACHE_CLASSES)}.")
    prefix, record_path = options.prefix, PrefixRecord.path(options.prefix)
    wanted = {"document": digest(ids), "cache": options.cache, "options": json.dumps(cache.settings)}
    start = time.perf_counter()
    if prefix.exists():
        try:
            found = PrefixRecord(**json.loads(record_path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"{record_path} does not tell what document {prefix} is of. Name another file, or delete this one."
            ) from error
        PrefixRecord(**wanted, file=sha256_of_file(prefix), seconds_to_read=0).require_same(prefix, found)
        cache = CACHE_CLASSES[options.cache].load(prefix, model, device=model.device)
        seconds = time.perf_counter() - start
        print(f"loaded {prefix} in {seconds:.3f} s; reading the document took {found.seconds_to_read:.3f} s")
    else:
        check_output("--prefix", prefix)
        read_document(model, cache, ids)
        seconds = time.perf_counter() - start
        print(f"read the document in {seconds:.3f} s")
        cache.save(prefix)
        record = PrefixRecord(**wanted, file=sha256_of_file(prefix), seconds_to_read=seconds)
        record_path.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
    print(
        f"{len(ids):,} tokens, {num_kept(cache):,} kept by the layer that keeps most; the file has "
        f"{prefix.stat().st_size:,} bytes"
    )
    return cache


def main() -> None:
    """Read or load the document, and answer the questions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "questions", nargs="*", default=DEFAULT_QUESTIONS, help="each is answered from the document alone"
    )
    parser.add_argument("--document", type=Path, metavar="FILE", help="a text in UTF-8 (default: a novel)")
    parser.add_argument(
        "--tokens", type=positive_int, default=1536, metavar="N", help="of the document at most (default: 1536)"
    )
    parser.add_argument(
        "--prefix",
        type=Path,
        default=Path("prefix.safetensors"),
        metavar="FILE",
        help="where the compressed cache is, or goes (default: prefix.safetensors)",
    )
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=32, metavar="N", help="of each answer (default: 32)"
    )
    add_model_options(parser)
    add_cache_options(parser, "KeyDiffCache", "0.5")
    options = parser.parse_args()
    model, tokenizer = load_model(options)
    document = tokenizer(read_text(options.document), add_special_tokens=False, verbose=False)["input_ids"]
    ids = frame(tokenizer)[0] + document[: options.tokens]
    cache = prefix_of(model, options, ids)
    for question in options.questions:
        print(f"question: {question}")
        print(f"answer: {answer(model, tokenizer, cache, question, options.max_new_tokens)}", flush=True)


if __name__ == "__main__":
    run(main)
