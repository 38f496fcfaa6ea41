"""Tokenizers for tests, made without any file."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, and one special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", **special_tokens)


def sentence_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as SentencePiece's: words begin with a mark, unknown characters fall back to bytes."""
    pieces = ["<unk>", "▁It", "▁is", "▁a", "▁tr", "uth", "▁", "!", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *"Itiarsuh", "It", "is", "tr", "ut"])}
    merges = [tuple(pair.split("+")) for pair in "I+t ▁+It i+s ▁+is ▁+a t+r ▁+tr u+t ut+h".split()]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
