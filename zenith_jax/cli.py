"""The command `zenith`: one subcommand for each row of COMMANDS."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """add_arguments(parser) declares the options; run(arguments) returns the exit code.

    Both import what they need themselves, so that `zenith --help` is quick.
    """

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def _doctor(arguments: argparse.Namespace) -> int:
    from zenith_jax import doctor

    return doctor.main(as_json=arguments.json)


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="timed batches of each (default 20)")
    parser.add_argument("--sites", action="store_true", help="list every site with file and line")


def _demo(arguments: argparse.Namespace) -> int:
    from zenith_jax.demo import run

    return run.main(dtype=arguments.dtype, runs=arguments.runs, sites=arguments.sites)


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    from zenith_jax.bench import run

    run.add_arguments(parser)


def _bench(arguments: argparse.Namespace) -> int:
    from zenith_jax.bench import run

    return run.main(arguments)


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    from zenith_jax import explain_command

    explain_command.add_arguments(parser)


def _explain(arguments: argparse.Namespace) -> int:
    from zenith_jax import explain_command

    return explain_command.main(arguments)


def _onnx_arguments(parser: argparse.ArgumentParser) -> None:
    from zenith_jax import onnx_command

    onnx_command.add_arguments(parser)


def _onnx(arguments: argparse.Namespace) -> int:
    from zenith_jax import onnx_command

    return onnx_command.main(arguments)


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    from zenith_jax import serve_command

    serve_command.add_arguments(parser)


def _serve(arguments: argparse.Namespace) -> int:
    from zenith_jax import serve_command

    return serve_command.main(arguments)


COMMANDS = {
    "bench": Command("zenith.jit against jax.jit, op by op", _bench_arguments, _bench),
    "demo": Command("a sentence encoder with real weights: jax.jit against zenith.jit", _demo_arguments, _demo),
    "doctor": Command("what is installed, built and found, and how to fix what is missing", _doctor_arguments, _doctor),
    "explain": Command("what is fused in a function, what is not, and why", _explain_arguments, _explain),
    "onnx": Command("an ONNX model: what is in it, what it gives, how fast it is", _onnx_arguments, _onnx),
    "serve": Command("a model behind NVIDIA's Triton Inference Server", _serve_arguments, _serve),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `zenith ARGV`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="zenith", description="Hand-tuned kernels for the JAX model you already have."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.summary, description=command.summary)
        command.add_arguments(subparser)
    arguments = parser.parse_args(argv)
    return COMMANDS[arguments.command].run(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
