"""A Triton server on this machine: finds one, runs it on a repository, knows when it is ready, and ends it.

Not a server of our own. Found are `tritonserver` on PATH, and the one inside of the wheel `nvidia-pytriton`, unpacked:

    pip install --no-deps --target ~/.cache/zenith/triton nvidia-pytriton==0.7.0

which is never imported. ZENITH_TRITON names another folder of that kind, or a tritonserver.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zenith_jax.errors import ServingError

VARIABLE = "ZENITH_TRITON"
DEFAULT_FOLDER = pathlib.Path("~/.cache/zenith/triton")
INSTALL = f"pip install --no-deps --target {DEFAULT_FOLDER} nvidia-pytriton==0.7.0"
READY_SECONDS = 600.0


@dataclasses.dataclass(frozen=True)
class Installation:
    """A tritonserver. bundle: the folder `pytriton/tritonserver` of the wheel; None for one that is installed whole."""

    binary: pathlib.Path
    bundle: pathlib.Path | None = None

    @contextlib.contextmanager
    def prepared(self) -> Iterator[tuple[list[str], dict[str, str]]]:
        """Arguments and environment with which the server runs models in this Python and its packages."""
        environment = dict(os.environ)
        # The stub embeds a Python, whose packages are those of the first python3 on PATH.
        environment["PATH"] = os.pathsep.join([str(pathlib.Path(sys.executable).parent), environment.get("PATH", "")])
        libraries = [str(sysconfig.get_config_var("LIBDIR") or ""), environment.get("LD_LIBRARY_PATH", "")]
        if self.bundle is None:
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(p for p in libraries if p)
            yield [], environment
            return
        libraries.insert(1, str(self.bundle.parents[1] / "nvidia_pytriton.libs"))
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(p for p in libraries if p)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = self.bundle / "python_backend_stubs" / version / "triton_python_backend_stub"
        if not stub.is_file():
            raise ServingError(f"{self.bundle} has no stub for Python {version}: run Zenith in one of "
                               f"{sorted(p.name for p in stub.parents[1].iterdir())}")  # fmt: skip
        if not has_libpython():
            raise ServingError(
                f"{sys.executable} has no shared library libpython{version}.so, which Triton's stub needs: use a "
                "Python that has one (Debian: apt install libpython3-dev; pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared)"
            )
        with tempfile.TemporaryDirectory(prefix="zenith-triton-") as folder:
            backend = pathlib.Path(folder) / "python"
            backend.mkdir()
            for file in (self.bundle / "backends" / "python").iterdir():
                if file.is_file():
                    (backend / file.name).symlink_to(file)
            shutil.copy(stub, backend / stub.name)
            (backend / stub.name).chmod(0o755)  # pip does not keep the bit
            yield [f"--backend-directory={folder}"], environment


def find_triton(path: str | os.PathLike[str] | None = None) -> Installation:
    """The server at `path`, or that of ZENITH_TRITON, on PATH, or in the default folder. Raises ServingError."""
    given = path or os.environ.get(VARIABLE)
    if given:
        found = _installation(pathlib.Path(given).expanduser())
        if found is None:
            raise ServingError(f"{given} is neither a tritonserver nor a folder with one: {INSTALL}")
        return found
    on_path = shutil.which("tritonserver")
    if on_path:
        return Installation(pathlib.Path(on_path))
    found = _installation(DEFAULT_FOLDER.expanduser())
    if found is None:
        raise ServingError(f"there is no Triton server here, neither on PATH nor in {DEFAULT_FOLDER}: {INSTALL}")
    return found


def _installation(path: pathlib.Path) -> Installation | None:
    bundle = path / "pytriton" / "tritonserver"
    if (bundle / "bin" / "tritonserver").is_file():
        return Installation(bundle / "bin" / "tritonserver", bundle)
    binary = path / "bin" / "tritonserver" if path.is_dir() else path
    return Installation(binary) if binary.is_file() else None


def has_libpython() -> bool:
    """Whether this Python's shared library is here, which the bundle's stubs load."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    library = pathlib.Path(sysconfig.get_config_var("LIBDIR") or "/nowhere") / f"lib{name}.so.1.0"
    return library.is_file() or ctypes.util.find_library(name) is not None


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on just now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


class TritonServer:
    """A running server as a context manager: `with TritonServer(repository.path) as server: server.http`.

    host: what it binds; nothing but this machine unless told otherwise. ports: HTTP, gRPC and metrics; 0 takes a free
    one. exit_seconds: how long requests in flight may take when it ends. explicit: models are loaded and unloaded by
    request, all of them at first; otherwise once.
    """

    def __init__(
        self,
        repository: str | os.PathLike[str],
        *,
        installation: Installation | None = None,
        host: str = "127.0.0.1",
        ports: tuple[int, int, int] = (0, 0, 0),
        exit_seconds: int = 30,
        explicit: bool = False,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        log: str | os.PathLike[str] | None = None,
    ):
        self.repository = pathlib.Path(repository)
        self.host, self.exit_seconds, self.explicit = host, exit_seconds, explicit
        free = iter(free_ports(3))
        self.http_port, self.grpc_port, self.metrics_port = (p or next(free) for p in ports)
        self._installation = installation or find_triton()
        self._options, self._environment, self._log = list(options), dict(environment or {}), log
        self._stack = contextlib.ExitStack()
        self._shared = f"zenith_{uuid.uuid4().hex[:12]}"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def http(self) -> str:
        return f"{self._reached}:{self.http_port}"

    @property
    def grpc(self) -> str:
        return f"{self._reached}:{self.grpc_port}"

    @property
    def metrics_address(self) -> str:
        return f"{self._reached}:{self.metrics_port}"

    @property
    def _reached(self) -> str:
        return "127.0.0.1" if self.host in ("0.0.0.0", "::", "") else self.host

    def __enter__(self) -> TritonServer:
        try:
            self.start()
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def start(self) -> None:
        """Starts it; `wait_until_ready` follows."""
        arguments, environment = self._stack.enter_context(self._installation.prepared())
        log = None
        if self._log is not None:
            log = self._stack.enter_context(open(self._log, "ab"))  # noqa: SIM115
        models = sorted(p.name for p in self.repository.iterdir() if (p / "config.pbtxt").is_file())
        control = ["--model-control-mode=explicit", *(f"--load-model={m}" for m in models)] if self.explicit else []
        command = [
            str(self._installation.binary),
            f"--model-repository={self.repository}",
            f"--http-address={self.host}",
            f"--grpc-address={self.host}",
            f"--metrics-address={self.host}",
            f"--http-port={self.http_port}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-port={self.metrics_port}",
            f"--exit-timeout-secs={self.exit_seconds}",
            f"--backend-config=python,shm-region-prefix-name={self._shared}",
            # One bad model does not stop the others; readiness still asks for all.
            "--exit-on-error=false",
            "--disable-auto-complete-config",
            *control,
            *arguments,
            *self._options,
        ]
        # Of a session of its own: a Ctrl-C in the terminal reaches it once, by us.
        self.process = subprocess.Popen(
            command,
            env={**environment, **self._environment},
            stdout=log,
            stderr=subprocess.STDOUT if log is not None else None,
            start_new_session=True,
        )

    def is_ready(self) -> bool:
        """Whether the server and every model in the repository answer."""
        try:
            with urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def index(self) -> list[dict[str, Any]]:
        """Triton's repository index: name, version, state and reason of each model."""
        request = urllib.request.Request(f"http://{self.http}/v2/repository/index", data=b"{}", method="POST")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def metrics(self) -> str:
        """What Prometheus reads."""
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=30) as answer:
            return answer.read().decode()

    def wait_until_ready(self, seconds: float = READY_SECONDS) -> None:
        """Raises ServingError where the server ends, a model fails to load, or the time is over."""
        end = time.monotonic() + seconds
        while not self.is_ready():
            self.raise_failure()
            if time.monotonic() > end:
                raise ServingError(f"Triton was not ready after {seconds:.0f} s{self._see_log}")
            time.sleep(0.1)

    def raise_failure(self) -> None:
        """Raises ServingError where it has ended, or where a model failed to load."""
        assert self.process is not None
        if self.process.poll() is not None:
            code = self.process.returncode
            raise ServingError(f"Triton ended with exit code {code} before it was ready{self._see_log}")
        failed = self._failed()
        if failed:
            raise ServingError(f"Triton could not load {failed}")

    @property
    def _see_log(self) -> str:
        return f"; see {self._log}" if self._log is not None else ""

    def _failed(self) -> str:
        """The first model that failed and why, once the server listens."""
        try:
            states = self.index()
        except (urllib.error.URLError, OSError, ValueError):
            return ""
        found = [m for m in states if m.get("state") == "UNAVAILABLE" and m.get("reason", "unloaded") != "unloaded"]
        return f"{found[0]['name']}: {found[0]['reason']}" if found else ""

    def backends(self) -> set[int]:
        """Process ids of the models' instances: Triton's Python backend runs each in a stub of its own."""
        parents, stubs = {}, set()
        for entry in pathlib.Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    command = (entry / "cmdline").read_bytes().split(b"\0")[0]
                    parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                except (OSError, IndexError):
                    continue  # it ended meanwhile
                if command.endswith(b"triton_python_backend_stub"):
                    stubs.add(int(entry.name))

        def is_ours(pid: int) -> bool:
            assert self.process is not None
            return pid == self.process.pid or (pid in parents and is_ours(parents[pid]))

        return {pid for pid in stubs if is_ours(pid)}

    def wait(self, seconds: float | None = None) -> int:
        """The exit code, when it ends."""
        assert self.process is not None
        return self.process.wait(seconds)

    def stop(self) -> int | None:
        """Ends it: accepted requests are answered first, for up to exit_seconds. Returns the exit code."""
        code = None
        if self.process is not None:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGINT)
            try:
                code = self.process.wait(self.exit_seconds + 30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                code = self.process.wait()
        self._stack.close()
        for region in pathlib.Path("/dev/shm").glob(f"{self._shared}*"):  # of a stub that was killed
            region.unlink(missing_ok=True)
        return code
