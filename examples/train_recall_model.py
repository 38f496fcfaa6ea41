"""
Trains the recall model that the package ships in pyramid_cache/lab/data/recall_model.

    python examples/train_recall_model.py --out recall_model

Each sequence is a stream of keys. Its value follows each key, and is drawn anew for each sequence. The loss is on the
value of every key that has come before. (A loss on questions at the end of a sequence alone never left chance.) The
streams begin short. Whenever the model is right about most repeated keys, the number of pairs rises. This takes some
minutes on two cores.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from rich.console import Console
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from pyramid_cache.lab.evaluation.recall import MAX_TOKENS, NUM_KEYS, NUM_VALUES, random_pairs
from pyramid_cache.lab.terminal import DTYPES, ProgressBar


FIRST_NUM_PAIRS = 8
# Streams draw from at most so many keys: of more, too few come twice in MAX_TOKENS tokens.
LAST_NUM_PAIRS = 240
GROWTH = 1.4
# The share of repeated keys that a model must be right about before there are more pairs.
LEARNED = 0.94
PROBE_LENGTHS = (64, 128, 256, 448)
NUM_PROBES = 4
STEPS_PER_PROBE = 50


def build_model() -> LlamaForCausalLM:
    """An untrained recall model: two layers are the fewest that can learn to find a key and copy what followed it."""
    config = LlamaConfig(
        vocab_size=NUM_KEYS + NUM_VALUES,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=128**-0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    # As large as what layers add to them. Of embeddings as small as other weights, the second layer sees too little to
    # tell keys apart, and training stays for thousands of steps at guessing among the values of the stream.
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    return model


def random_streams(
    batch_size: int, num_pairs: int, num_draws: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Streams of keys, drawn from `num_pairs` pairs that differ from stream to stream.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The token ids `(batch, 2 * num_draws)`, keys and values in turn, and a
        bool mask `(batch, num_draws)`: True where the key has come before.
    """
    keys = torch.rand(batch_size, NUM_KEYS, generator=generator).argsort(dim=-1)[:, :num_pairs]
    values = torch.randint(NUM_KEYS, NUM_KEYS + NUM_VALUES, (batch_size, num_pairs), generator=generator)
    draws = torch.randint(num_pairs, (batch_size, num_draws), generator=generator)
    streams = torch.stack([keys.gather(1, draws), values.gather(1, draws)], dim=-1).flatten(1)
    is_same = draws[:, :, None] == draws[:, None, :]
    return streams, is_same.tril(-1).any(dim=-1)


@torch.no_grad()
def recall(model: LlamaForCausalLM, num_tokens: int, generator: random.Random) -> float:
    """The share of right values when each key of `num_tokens` tokens of different pairs is asked for behind them."""
    num_right = num_asked = 0
    for _ in range(NUM_PROBES):
        keys, values = (torch.tensor(ids) for ids in random_pairs(num_tokens // 2, generator))
        context = torch.stack([keys, values], dim=-1).flatten()
        prompts = torch.cat([context.expand(len(keys), -1), keys[:, None]], dim=1)
        for rows, answers in zip(prompts.split(32), values.split(32), strict=True):
            logits = model(rows, logits_to_keep=1, use_cache=False).logits[:, -1]
            num_right += int((logits.argmax(dim=-1) == answers).sum())
        num_asked += len(keys)
    return num_right / num_asked


def train(options: argparse.Namespace, progress: ProgressBar) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """
    Trains until the model recalls `options.target` of the longest probe.

    Returns:
        `tuple[LlamaForCausalLM, dict[str, float]]`: The model, and what it recalls by the length of the probe.

    Raises:
        RuntimeError: It did not get there within `options.max_steps`.
    """
    torch.manual_seed(options.seed)
    generator, probe_generator = torch.Generator().manual_seed(options.seed), random.Random(options.seed)
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    num_pairs, accuracy, last_steps = FIRST_NUM_PAIRS, 0.0, 0
    for step in range(1, options.max_steps + 1):
        is_last = num_pairs == LAST_NUM_PAIRS
        last_steps += is_last
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1.0, step / 100) * 0.5 ** (last_steps / options.half_life)
        num_draws = min(2 * num_pairs, MAX_TOKENS // 2)
        batch_size = max(options.tokens_per_step // (2 * num_draws), 1)
        streams, is_repeated = random_streams(batch_size, num_pairs, num_draws, generator)
        logits = model(streams, use_cache=False).logits[:, ::2][is_repeated]
        answers = streams[:, 1::2][is_repeated]
        loss = functional.cross_entropy(logits, answers)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        accuracy += 0.1 * ((logits.argmax(dim=-1) == answers).float().mean().item() - accuracy)
        progress(f"{num_pairs} pairs: {accuracy:.0%} of repeated keys", step, options.max_steps)
        if not is_last and accuracy > LEARNED:
            num_pairs, accuracy = min(round(num_pairs * GROWTH), LAST_NUM_PAIRS), 0.0
        if is_last and last_steps % STEPS_PER_PROBE == 0:
            if recall(model, PROBE_LENGTHS[-1], probe_generator) >= options.target:
                return model, {str(length): recall(model, length, probe_generator) for length in PROBE_LENGTHS}
    raise RuntimeError(
        f"After {options.max_steps} steps with {num_pairs} pairs the model does not recall {options.target:.0%}. "
        "Raise --max-steps, or try another --seed."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the recall model that the package ships.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write the model")
    parser.add_argument("--target", type=float, default=0.99, help="recall at which training ends (default: 0.99)")
    parser.add_argument("--max-steps", type=int, default=10_000, metavar="N", help="give up after (default: 10000)")
    parser.add_argument("--tokens-per-step", type=int, default=2048, metavar="N", help="default: 2048")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="at its highest (default: 0.002)")
    parser.add_argument(
        "--half-life", type=int, default=200, metavar="N", help="steps with all pairs that halve it (default: 200)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the file (default: float16)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with ProgressBar(Console(stderr=True)) as progress:
        model, trained = train(options, progress)
    model.to(getattr(torch, options.dtype)).save_pretrained(options.out)
    stored = LlamaForCausalLM.from_pretrained(options.out, dtype=torch.float32).eval()
    probe_generator = random.Random(options.seed + 1)
    shipped = {str(length): recall(stored, length, probe_generator) for length in PROBE_LENGTHS}
    num_bytes = (options.out / "model.safetensors").stat().st_size
    print(json.dumps({"recall": trained, f"recall_as_{options.dtype}": shipped, "bytes": num_bytes}, indent=2))


if __name__ == "__main__":
    main()
