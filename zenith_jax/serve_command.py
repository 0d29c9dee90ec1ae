"""`zenith serve MODEL`: a model behind NVIDIA's Triton Inference Server, over HTTP and gRPC.

MODEL is an ONNX file, a file that CompiledModel.save wrote, `FILE.py:FUNCTION` or `module:FUNCTION`, or a folder that
is a repository already. A function's example arguments come from --args, or from FUNCTION_args() or example_args()
beside it. Files of models are data: nothing in them is unpickled or evaluated. A Python file is run, as imports are.

  zenith serve encoder.zenith --http-port 8000

Listens on 127.0.0.1 unless --host says otherwise. SIGTERM and SIGINT end it when accepted requests are answered.
Exit codes: 0 ended by a signal; 1 the server failed, or the process of a model died; 2 the model or the command line
is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import pathlib
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from zenith_jax import explain_command
from zenith_jax.errors import ServingError, ZenithError
from zenith_jax.explain_command import UsageError

WATCH_SECONDS = 0.5  # between looks at the models' processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (__doc__ or "").split("\n", 1)[1]
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--name", help="under which clients ask for it; default: the file's or the function's")
    parser.add_argument("--args", metavar="SPECS", help='shapes of a function\'s arguments: "f32[1,128], i32[1]"')
    parser.add_argument(
        "--dynamic",
        metavar="NAME=SIZES",
        action="append",
        default=[],
        help="a dimension and the sizes to compile for; requests are joined along batch: --dynamic batch=1,8,32",
    )
    parser.add_argument("--max-queue-delay-us", type=int, default=0, metavar="N", help="how long to wait for others")
    parser.add_argument("--instances", type=int, default=1, metavar="N", help="processes, for each GPU")
    parser.add_argument("--gpus", metavar="IDS", default="", help="such as 0,1; default: the CPU")
    parser.add_argument("--repository", metavar="FOLDER", type=pathlib.Path, help="add the model there, and keep it")
    parser.add_argument("--write-only", action="store_true", help="write --repository, and start no server")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is everybody's")
    parser.add_argument("--http-port", type=int, default=8000, metavar="N", help="0: a free one")
    parser.add_argument("--grpc-port", type=int, default=8001, metavar="N")
    parser.add_argument("--metrics-port", type=int, default=8002, metavar="N")
    parser.add_argument("--exit-seconds", type=int, default=30, metavar="N", help="for requests in flight at the end")
    parser.add_argument("--triton", metavar="PATH", help="a tritonserver, or an unpacked nvidia-pytriton")
    parser.add_argument(
        "--triton-option",
        metavar="OPTION",
        action="append",
        default=[],
        help="one of tritonserver's own, such as --triton-option=--trace-config=mode=opentelemetry",
    )


def main(arguments: argparse.Namespace) -> int:
    with contextlib.ExitStack() as stack:
        try:
            repository = stack.enter_context(_repository(arguments))
            if arguments.write_only:
                return 0
            server = _server(arguments, repository)
        except (ZenithError, UsageError, OSError) as error:
            print(f"zenith serve: {error}", file=sys.stderr)
            return 2
        return run(server)


def run(server: Any) -> int:
    """Runs the server until a signal or its own end; returns the exit code."""
    asked = threading.Event()
    before = {s: signal.signal(s, lambda *_: asked.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.start()
        ended = threading.Thread(target=lambda: (server.wait(), asked.set()), daemon=True)
        ended.start()
        try:
            while not asked.is_set() and not server.is_ready():
                server.raise_failure()
                asked.wait(0.1)
        except ServingError as error:
            print(f"zenith serve: {error}", file=sys.stderr)
            server.stop()
            return 1
        if not asked.is_set():
            models = ", ".join(sorted({m["name"] for m in server.index()}))
            print(f"zenith serve: ready: {models} at http://{server.http} and grpc://{server.grpc}, ", end="")
            print(f"metrics at http://{server.metrics_address}/metrics", flush=True)
        backends = server.backends()
        while not asked.wait(WATCH_SECONDS):
            # Triton goes on saying that a model is ready whose process was killed, and cannot start it again.
            if backends - server.backends() and server.process.poll() is None:
                print("zenith serve: the process of a model died, ending", file=sys.stderr)
                server.stop()
                return 1
        code = server.process.poll()
        if code is not None:  # by itself
            print(f"zenith serve: Triton ended with exit code {code}", file=sys.stderr)
            return 1
        code = server.stop()
        if code != 0:
            print(f"zenith serve: Triton ended with exit code {code}: requests may have been cut off", file=sys.stderr)
        return 0 if code == 0 else 1
    finally:
        server.stop()
        for s, handler in before.items():
            signal.signal(s, handler)


def _server(arguments: argparse.Namespace, repository: pathlib.Path) -> Any:
    from zenith_jax.serving import TritonServer, find_triton

    return TritonServer(
        repository,
        installation=find_triton(arguments.triton),
        host=arguments.host,
        ports=(arguments.http_port, arguments.grpc_port, arguments.metrics_port),
        exit_seconds=arguments.exit_seconds,
        options=arguments.triton_option,
    )


@contextlib.contextmanager
def _repository(arguments: argparse.Namespace) -> Iterator[pathlib.Path]:
    """The folder to serve, written where the model is not one already."""
    from zenith_jax.serving import TritonModelRepository, find_triton

    path = pathlib.Path(arguments.model)
    if path.is_dir() and any(path.glob("*/config.pbtxt")):
        yield path
        return
    if arguments.write_only and arguments.repository is None:
        raise UsageError("--write-only needs --repository FOLDER")
    if not arguments.write_only:
        find_triton(arguments.triton)  # before a model is compiled for nothing
    compiled, name, dtypes = _model(arguments)
    with contextlib.ExitStack() as stack:
        if arguments.repository is None:
            root = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zenith-serve-"))) / "models"
        else:
            root = arguments.repository
        TritonModelRepository(root).add(
            compiled,
            name=arguments.name or name,
            dynamic_batching=dict(max_queue_delay_us=arguments.max_queue_delay_us),
            instances=arguments.instances,
            gpus=[int(n) for n in arguments.gpus.split(",") if n],
            dtypes=dtypes,
        )
        yield root


def _model(arguments: argparse.Namespace) -> tuple[Any, str, dict[str, str]]:
    """(CompiledModel or the path of one, a name for it, dtypes that its clients send)."""
    import zenith_jax as zenith

    target, dynamic = arguments.model, _dynamic(arguments.dynamic)
    path = pathlib.Path(target)
    if path.suffix == ".zenith":
        if dynamic:
            raise UsageError("a saved model has the sizes that it was compiled for: --dynamic is for others")
        return zenith.load(path), path.stem, {}
    if path.suffix == ".onnx":
        compiled = zenith.compile(str(path), dynamic=dynamic or None)
        return compiled, path.stem, _wide_inputs(zenith.onnx.load(path), compiled)
    file, _, name = target.rpartition(":")
    if not file or not name:
        raise UsageError(f"expected FILE.onnx, FILE.zenith, FILE.py:FUNCTION or module:FUNCTION, got {target!r}")
    if not file.endswith(".py"):
        file = _file_of(file)
    function, values = explain_command.load(f"{file}:{name}", arguments.args)
    return zenith.compile(function, *values, dynamic=dynamic or None), name.replace(".", "_"), {}


def _wide_inputs(model: Any, compiled: Any) -> dict[str, str]:
    """64-bit inputs of an ONNX model, which its clients send, though JAX computes in 32 bits."""
    from zenith_jax.serving.wire import WIDER

    own = {s.name: s.dtype for s in compiled.inputs}
    declared = {i.name: str(i.dtype) for i in model.inputs}
    return {n: d for n, d in declared.items() if d in WIDER.get(own.get(n, ""), ())}


def _file_of(module: str) -> str:
    sys.path.insert(0, os.getcwd())
    try:
        file = importlib.import_module(module).__file__
    except ImportError as error:
        raise UsageError(f"{module} cannot be imported: {error}") from error
    if file is None:
        raise UsageError(f"{module} has no file")
    return file


def _dynamic(given: Sequence[str]) -> dict[str, tuple[int, ...]]:
    found = {}
    for text in given:
        name, _, sizes = text.partition("=")
        try:
            found[name] = tuple(int(n) for n in sizes.split(","))
        except ValueError:
            raise UsageError(f"--dynamic is NAME=SIZES such as batch=1,8,32, got {text!r}") from None
    return found
