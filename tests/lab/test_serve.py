"""`pyramid-cache serve`, asked by the `openai` package from another process."""

import concurrent.futures
import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyramid_cache import SnapKVCache
from pyramid_cache.lab import cli
from pyramid_cache.lab.novel import read_text
from pyramid_cache.lab.weights import fetch_default_model


NUM_CHATS, PORT = 32, 18473


def test_what_the_command_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyramid_cache.serving", exc_type=ImportError)
    assert cli.main(["serve", "--cache", "dynamic"]) == 2
    assert "compresses nothing" in capsys.readouterr().err


@pytest.mark.slow
def test_chats_are_answered_as_generate_answers(tmp_path: Path) -> None:
    """32 chats at a time: each is answered as `generate` answers it with the same cache."""
    pytest.importorskip("pyramid_cache.serving", exc_type=ImportError)
    from openai import OpenAI

    folder = fetch_default_model()
    words = read_text().split()
    chats = [" ".join(words[80 * index : 80 * index + 60]) + "\nSum this up." for index in range(NUM_CHATS)]
    options = ["--cache", "snapkv", "--budget", "48", "--port", str(PORT), "--max-batch-tokens", "256"]
    command = [sys.executable, "-m", "pyramid_cache.lab.cli", "serve", *options, "--blocks", "600"]
    with (tmp_path / "server.txt").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            for _ in range(120):
                time.sleep(1)
                try:
                    urllib.request.urlopen(f"http://localhost:{PORT}/health")
                    break
                except OSError:
                    assert server.poll() is None, (tmp_path / "server.txt").read_text()
            client = OpenAI(base_url=f"http://localhost:{PORT}/v1", api_key="none", timeout=300)

            def ask(text: str) -> str:
                messages = [{"role": "user", "content": text}]
                answer = client.chat.completions.create(
                    model=str(folder), messages=messages, temperature=0, max_tokens=12
                )
                return answer.choices[0].message.content

            with concurrent.futures.ThreadPoolExecutor(NUM_CHATS) as pool:
                found = list(pool.map(ask, chats))
        finally:
            server.terminate()
            assert server.wait(60) == 130  # as Ctrl-C ends it
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for text, answer in zip(chats, found, strict=True):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        assert ids.shape[1] > 80
        cache = SnapKVCache(model.config, budget=48)
        with torch.no_grad():
            output = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False)
        assert answer == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_bench_serving(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 60 blocks, a request takes up to 17 as it is, and at most 6 once its prompt is compressed."""
    pytest.importorskip("pyramid_cache.serving", exc_type=ImportError)
    path = tmp_path / "record.json"
    sizes = "--requests 6 --prompt-tokens 96 --new-tokens 40 --blocks 60 --page-size 8 --max-batch-tokens 96"
    assert (
        cli.main(["bench", "serving", "--model", "tiny", "--budgets", "16", *sizes.split(), "--json", str(path)]) == 0
    )
    record = json.loads(path.read_text())
    whole, compressed = record["rows"]
    assert (whole["cache"], compressed["cache"]) == ("dynamic", "snapkv:16")
    assert (whole["most_in_flight"], compressed["most_in_flight"]) == (4, 6)  # some are at their beginning
    assert compressed["most_in_flight_ratio"] == 1.5 and compressed["tokens_per_second_ratio"] > 0
    assert not whole["errors"] and not compressed["errors"]
    assert "as they are" in capsys.readouterr().out
