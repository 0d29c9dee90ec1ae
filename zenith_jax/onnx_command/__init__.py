"""`zenith onnx inspect|run|check|bench MODEL.onnx`: what is in a model, what it gives, whether and how fast.

Inputs come from `--inputs FILE.npz`, from `--input NAME=FILE.npy`, from `--input NAME=VALUE`, and are random else, in
the shapes that the file declares; `--dim batch=4` says what a symbolic dimension is, else it is 1.

Exit codes: 0 as wished; 1 the answer is no (something is unsupported, results differ, Zenith is slower than asked for);
2 the command line, the file or its inputs are wrong.
"""

from __future__ import annotations

import argparse
import json
import sys

from zenith_jax.errors import ZenithError
from zenith_jax.onnx_command import bench, check, inspect, run
from zenith_jax.onnx_command.common import UsageError

ACTIONS = {"inspect": inspect.ACTION, "run": run.ACTION, "check": check.ACTION, "bench": bench.ACTION}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (__doc__ or "").split("\n", 1)[1]
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, action in ACTIONS.items():
        sub = actions.add_parser(
            name,
            help=action.summary,
            description=f"{action.summary}\n\n  {action.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("model", metavar="MODEL.onnx", help="a file, or a folder with one .onnx file")
        sub.add_argument("--json", action="store_true", help="print JSON")
        sub.add_argument("--dim", action="append", default=[], metavar="NAME=N", help="size of a symbolic dimension")
        sub.add_argument("--input", action="append", default=[], metavar="NAME=VALUE", help="a .npy file or a literal")
        sub.add_argument("--inputs", metavar="FILE.npz", help="arrays by the inputs' names")
        sub.add_argument("--seed", type=int, default=0, help="of random inputs (default 0)")
        action.add_arguments(sub)


def main(arguments: argparse.Namespace) -> int:
    action = ACTIONS[arguments.action]
    try:
        found, code = action.run(arguments)
    except (UsageError, ZenithError) as error:
        print(f"zenith onnx {arguments.action}: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        action.show(found)
    return code
