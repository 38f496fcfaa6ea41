"""What tests of the lab share: the folder of a tiny model."""

from pathlib import Path

import pytest
from massive_models import massive_model
from text_tokenizers import byte_tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers, with a token for each byte and one massive token, and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    massive_model(magnitude=1e4, vocab_size=257).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
