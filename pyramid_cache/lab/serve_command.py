"""`pyramid-cache serve`: transformers' OpenAI-compatible server, whose requests are compressed."""

import argparse
from typing import Any

from transformers import Cache, PreTrainedModel

from pyramid_cache.lab import terminal
from pyramid_cache.lab.registry import CACHES, Workload, find_entry
from pyramid_cache.lab.weights import MODEL_NAME, fetch_default_model


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand and its options."""
    parser = subparsers.add_parser(
        "serve",
        help="serve a model to OpenAI clients, with compressed requests",
        description="Starts transformers' own server (`transformers serve`) with continuous batching, in which each "
        "request is compressed. `pip install 'pyramid_cache[serving]'` brings what it needs.",
    )
    add = parser.add_argument
    add("--model", help=f"folder or hub id of a causal language model (default: {MODEL_NAME})")
    known = f"short or class name: {', '.join(CACHES)} (default: %(default)s)"
    add("--cache", default="snapkv", metavar="NAME", help=known)
    amount = "what a request keeps: tokens per layer, a fraction of its prompt, or bytes (default: %(default)s)"
    add("--budget", type=terminal.one_budget, default="1024", metavar="B", help=amount)
    number: dict[str, Any] = {"metavar": "N", "type": terminal.positive_int}
    add("--blocks", help="blocks of the paged cache (default: what memory allows)", **number)
    add("--max-batch-tokens", help="tokens of a forward pass (default: what transformers chooses)", **number)
    add("--host", default="localhost", help="address to listen at (default: %(default)s)")
    add("--port", default=8000, help="port to listen at (default: %(default)s)", **number)
    terminal.add_machine_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Serves until it is interrupted, by Ctrl-C or SIGTERM."""
    import signal
    import time

    import torch
    import uvicorn  # noqa: F401  # transformers would say that it lacks it in an ImportError of its own
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.cli.serve import Serve
    from transformers.generation.continuous_batching.continuous_api import ContinuousMixin

    from pyramid_cache.serving.manager import check_template, init_continuous_batching, replaced

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    entry, device = find_entry(options.cache), options.device or terminal.default_device()
    if not entry.has_budget:
        raise ValueError(f"`--cache {options.cache}` compresses nothing. Run `transformers serve` for that.")

    def build(model: PreTrainedModel) -> Cache:
        return entry.build(model, options.budget, Workload(1))

    managers: list[Any] = []

    def init(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        managers.append(init_continuous_batching(model, build(model), *args, **kwargs))  # type: ignore[arg-type]
        return managers[-1]

    if options.port > 65535:
        raise ValueError(f"`--port {options.port}`: ports end at 65535.")
    folder = str(fetch_default_model() if options.model in (None, MODEL_NAME) else options.model)
    with torch.device("meta"):  # what cannot be served is refused before any weights are loaded
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    check_template(empty, build(empty))  # type: ignore[arg-type]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with replaced(ContinuousMixin, "init_continuous_batching", init):
        server: Any = Serve(
            force_model=folder,
            continuous_batching=True,
            device=str(device),
            dtype=options.dtype or terminal.default_dtype(device),
            cb_num_blocks=options.blocks,
            cb_max_batch_tokens=options.max_batch_tokens,
            host=options.host,
            port=options.port,
            non_blocking=True,
        )
        try:
            terminal.say(terminal.message_console(), f"Serving {folder} at http://{options.host}:{options.port}/v1")
            while server._thread.is_alive():  # Python takes a thread whose `join` is interrupted for ended
                time.sleep(0.2)
        finally:
            for manager in managers:
                if manager.is_running():
                    manager.stop(hard_stop=True, timeout=10)
            server.kill_server()
