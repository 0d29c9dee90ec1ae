"""The command `zenith`: one subcommand for each row of COMMANDS."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from zenith_jax.version import __version__


class Command(NamedTuple):
    """module: has add_arguments(parser), which declares the options, and main(arguments), which returns the exit code:
    0 done, 1 failed, 2 wrongly called. Imported when the command is given, so that `zenith --help` is quick."""

    summary: str
    module: str


COMMANDS = {
    "bench": Command("zenith.jit against jax.jit, op by op", "bench.run"),
    "cache": Command("what max-autotune has measured: list, show, clear", "cache_command"),
    "compile": Command("a model of any framework as one file that runs without it", "compile_command"),
    "demo": Command("a sentence encoder with real weights: jax.jit against zenith.jit", "demo.run"),
    "doctor": Command("what is installed, built and found, and how to fix what is missing", "doctor"),
    "explain": Command("what is fused in a function, what is not, and why", "explain_command"),
    "onnx": Command("an ONNX model: what is in it, what it gives, how fast it is", "onnx_command"),
    "run": Command("a compiled file on given or random inputs", "run_command"),
    "serve": Command("a model behind NVIDIA's Triton Inference Server", "serve_command"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `zenith ARGV`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="zenith",
        description="Hand-tuned kernels for the JAX model you already have.",
        epilog="zenith COMMAND --help shows examples and exit codes.",
    )
    parser.add_argument("--version", action="version", version=f"zenith-jax {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.summary, description=command.summary)
        if name in argv[:1]:
            module = importlib.import_module(f"zenith_jax.{command.module}")
            module.add_arguments(subparser)
            subparser.set_defaults(main=module.main)
    arguments = parser.parse_args(argv)
    return arguments.main(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
