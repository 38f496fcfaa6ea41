"""`pyramid-cache bench`: what it measures, and its suites."""

import argparse
from pathlib import Path

from pyramid_cache.lab.bench.caches_command import SUITES, add_caches_parser, show_caches
from pyramid_cache.lab.bench.ops_command import add_ops_parser
from pyramid_cache.lab.terminal import check_output


# Of `--suite gpu`, in the order in which they run.
PARTS = ("tests", "ops", "caches", "blocks", "oracle", "gather")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand and its options."""
    parser = subparsers.add_parser(
        "bench",
        help="measure what the caches, and the attention ops beneath, cost",
        description="`bench caches` measures prefill, decode steps and bytes of caches in a model beside DynamicCache. `bench "
        "ops` measures what attention with scores costs beside attention alone. `bench --suite cpu` is every cache with a real "
        "model, in about ten minutes on two cores; `--suite paper` published settings, on a device that has the memory; "
        "`--suite gpu` everything that needs a GPU, in one run of less than ten minutes: the tests marked `cuda`, `bench ops`, "
        "long prompts of ShadowKVCache, scores of long prompts against an independent computation, and reading "
        "values from the host.",
    )
    parser.add_argument("--suite", choices=("cpu", "gpu", "paper"), help="run settings that are made for a purpose")
    parser.add_argument(
        "--parts",
        type=parts,
        metavar="PART,PART,...",
        help=f"of `--suite gpu`, run these only: {', '.join(PARTS)} (default: all but blocks)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, also after each part")
    parser.set_defaults(run=run, measurement=None)
    measurements = parser.add_subparsers(title="measurements", metavar="caches|ops")
    add_caches_parser(measurements)
    add_ops_parser(measurements)


def parts(text: str) -> list[str]:
    """Reads `--parts`."""
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(PARTS)}")
    return names


def run(options: argparse.Namespace) -> int:
    """Runs a measurement or a suite and prints what came of it; returns 1 if any part of it failed."""
    if options.measurement is not None:
        refuse_suite(options)
        options.measure(options)
        return 0
    return run_suite(options)


def refuse_suite(options: argparse.Namespace) -> None:
    """Raises where options of a suite stand before a measurement."""
    if options.suite is not None:
        raise ValueError(
            f"`bench --suite {options.suite}` has settings of its own: give --suite or {options.measurement}, not both."
        )
    if options.parts is not None:
        raise ValueError(f"--parts are of `bench --suite gpu`, not of `bench {options.measurement}`.")


def run_suite(options: argparse.Namespace) -> int:
    """Runs a suite and prints what came of it; returns 1 if any part of it failed."""
    if options.suite is None:
        raise ValueError("Nothing to measure: give `caches`, `ops` or --suite. See `pyramid-cache bench --help`.")
    check_output("--json", options.json)
    if options.suite != "gpu":
        if options.parts is not None:
            raise ValueError(f"--parts are of `bench --suite gpu`, not of --suite {options.suite}.")
        show_caches(SUITES[options.suite], options.json, None)
        return 0
    from pyramid_cache.lab.bench import suite

    record = suite.run(options.json, options.parts)
    return 1 if any(part["failures"] for part in record["parts"].values()) else 0
