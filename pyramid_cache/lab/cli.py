"""The command `pyramid-cache`."""

import argparse
import re
import sys
from collections.abc import Sequence

from pyramid_cache.lab import serve_command
from pyramid_cache.lab.bench import bench_command
from pyramid_cache.lab.demo import demo_command
from pyramid_cache.lab.evaluation import eval_command
from pyramid_cache.lab.profile import profile_command


# What the subcommands import beyond the core dependencies, and the extra that it comes with.
OPTIONAL_PACKAGES = (
    dict.fromkeys(("accelerate", "filelock", "gguf", "matplotlib", "rich"), "demo")
    | {"datasets": "eval"}
    | dict.fromkeys(("fastapi", "openai", "uvicorn"), "serving")
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; each sets `run`, a function of the parsed arguments that may return a status."""
    parser = argparse.ArgumentParser(
        prog="pyramid-cache", description="Key-value caches for transformers that keep only the tokens that matter."
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (demo_command, bench_command, eval_command, profile_command, serve_command):
        command.add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Runs the command line. Returns the exit status: 0, or what the subcommand returns; with one line on stderr 2 for
    options that cannot be honoured, 1 for anything else that the user can mend, and 130 when interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Unicode gets "?" for a bar, not a traceback
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, NotImplementedError) as error:
        # How the caches and the commands refuse what they are asked for.
        return fail(error, 2)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL_PACKAGES:
            raise
        extra = OPTIONAL_PACKAGES[error.name]
        return fail(f"the package `{error.name}` is missing; run: pip install 'pyramid_cache[{extra}]'", 1)
    except (OSError, MemoryError, RuntimeError) as error:
        # torch has no exception of its own for a CPU that cannot allocate; its CUDA one is a RuntimeError too.
        if isinstance(error, RuntimeError) and not re.search("allocate|out of memory", str(error)):
            raise
        return fail(error, 1)
    except KeyboardInterrupt:
        return fail("interrupted", 130)


def fail(problem: Exception | str, status: int) -> int:
    """Says on one line of stderr what went wrong, and returns the exit status."""
    print(f"pyramid-cache: error: {' '.join(str(problem).split()) or type(problem).__name__}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
