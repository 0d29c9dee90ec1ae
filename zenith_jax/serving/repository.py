"""Writes a model repository for Triton: configuration, versions, the saved model, and the entry of its Python backend.

    repository/
      NAME/
        config.pbtxt          shapes, dtypes, batching, instances
        1/
          model.zenith        what CompiledModel.save wrote
          model.py            template.py: loads the other by zenith_jax.serving.backend
          serving.json        what the backend must know besides
          cache/              compiled programs for machines like this one, unless ahead_of_time=False

A version appears under its number whole or not at all: it is written beside the repository and renamed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zenith_jax import native
from zenith_jax.errors import ServingError
from zenith_jax.serving import ahead, wire

MODEL, SETTINGS = "model.zenith", "serving.json"
_TEMPLATE = pathlib.Path(__file__).parent / "template.py"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclasses.dataclass(frozen=True)
class Batching:
    """Triton's dynamic batcher. max_queue_delay_us: how long a request may wait for others; 0: only while the model is
    busy. max_queue_size: requests beyond it are refused at once; 0: none."""

    max_queue_delay_us: int = 0
    max_queue_size: int = 0


class TritonModelRepository:
    """The models in a folder, which is made where it is not there."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path).absolute()

    def versions(self, name: str) -> list[int]:
        """Of a model, ascending."""
        folder = self.path / name
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []

    def add(
        self,
        compiled: Any,
        *,
        name: str | None = None,
        version: int | None = None,
        max_batch_size: int | None = None,
        dynamic_batching: bool | Batching | Mapping[str, int] = True,
        instances: int = 1,
        gpus: Sequence[int] = (),
        memory_fraction: float | None = None,
        dtypes: Mapping[str, str] | None = None,
        ahead_of_time: bool = True,
    ) -> pathlib.Path:
        """Adds a model, or a version of one, and returns the version's folder.

        compiled: a CompiledModel, which is saved for where its instances are, or the path of a saved one.
        name: default the model's own. version: default one more than the latest.
        max_batch_size: default the largest size that the model was compiled for along its dimension "batch", which
        must then come first in every input and output. 0, and the only choice without one: requests are not joined.
        dynamic_batching: join requests that wait: True, False, or Batching's values.
        instances: processes, for each GPU of `gpus` or on the CPU. memory_fraction: of a GPU's memory for each
        instance; default 0.9 shared by the instances on it.
        dtypes: {input: "int64"}: what clients send where the model computes in 32 bits.
        ahead_of_time: also store compiled programs, for a start without a compiler on machines like this one, and
        measure what each of them takes and, on a CPU, how many threads they are faster with: two processes hold the
        model meanwhile.

        Raises ServingError, and SavedModelError for a loaded model that has no programs for these instances.
        """
        from zenith_jax.compiled import CompiledModel, load

        if gpus and ahead_of_time and native.default_platform() != "cuda":
            raise ServingError(
                f"programs for the GPUs {list(gpus)} cannot be compiled ahead of time where JAX computes on "
                f"{native.default_platform()}: add the model with ahead_of_time=False, or on a machine with such a GPU"
            )
        model = compiled if isinstance(compiled, CompiledModel) else load(compiled)
        name = name if name is not None else re.sub(r"[^A-Za-z0-9_.-]+", "_", model.name).strip("_.-") or "model"
        if not _NAME.fullmatch(name):
            raise ServingError(
                f"a model's name is letters, digits, '_', '.' and '-', and the folder's name: got {name!r}"
            )
        batch, largest = batch_dimension(model, max_batch_size)
        config = configuration(
            model,
            name=name,
            batch=batch,
            max_batch_size=largest,
            batching=_batching(dynamic_batching) if largest else None,
            instances=_instances(instances, gpus),
            dtypes=_checked_dtypes(model, dtypes or {}),
        )
        existing = self.versions(name)
        version = version if version is not None else (existing[-1] + 1 if existing else 1)
        if version < 1 or version in existing:
            raise ServingError(
                f"{name} has the versions {existing}: a new one must be another number, from 1, got {version}"
            )
        settings = dict(
            batch=batch,
            max_batch_size=largest,
            memory_fraction=memory_fraction if memory_fraction is not None else 0.9 / max(instances, 1),
            pool_threads=ahead.POOL_THREADS[0],
            seconds=[],
        )
        self.path.mkdir(parents=True, exist_ok=True)
        with self._staged() as staged:
            if isinstance(compiled, CompiledModel):
                model.save(staged / MODEL, platforms=["cuda" if gpus else "cpu"])
            else:
                shutil.copyfile(compiled, staged / MODEL)
            shutil.copyfile(_TEMPLATE, staged / "model.py")
            (staged / SETTINGS).write_text(json.dumps(settings, indent=1))
            if ahead_of_time:
                settings.update(ahead.compile_ahead(staged, of_cpu=not gpus, fused=bool(model.report.fused)))
                (staged / SETTINGS).write_text(json.dumps(settings, indent=1))
            return self._publish(staged, name, version, config)

    @contextlib.contextmanager
    def _staged(self) -> Iterator[pathlib.Path]:
        """A folder in the repository's file system that no server looks into."""
        folder = tempfile.mkdtemp(prefix=f".{self.path.name}-", dir=self.path.parent)
        try:
            yield pathlib.Path(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _publish(self, staged: pathlib.Path, name: str, version: int, config: str) -> pathlib.Path:
        """Renames the version into its place; a new model as a whole, configuration included."""
        staged.chmod(0o755)
        target = self.path / name
        if not target.exists():
            with self._staged() as whole:
                whole.chmod(0o755)
                (whole / "config.pbtxt").write_text(config)
                staged.rename(whole / str(version))
                try:
                    whole.rename(target)
                except OSError as error:
                    raise ServingError(f"{target} was made by somebody else meanwhile: add the model again") from error
            return target / str(version)
        staged.rename(target / str(version))
        beside = target / f".config.{os.getpid()}"
        beside.write_text(config)
        os.replace(beside, target / "config.pbtxt")
        return target / str(version)


def batch_dimension(model: Any, max_batch_size: int | None) -> tuple[str | None, int]:
    """The dimension along which requests are joined, and Triton's max_batch_size. Raises ServingError."""
    firsts = {s.shape[0] if s.shape else None for s in (*model.inputs, *model.outputs)}
    (name,) = firsts if len(firsts) == 1 else (None,)
    if not isinstance(name, str) or max_batch_size == 0:
        if max_batch_size:
            raise ServingError(
                f"{model.name} has no dimension that comes first in all of its inputs and outputs and was compiled for "
                f"several sizes, got {sorted(map(str, firsts))}: max_batch_size must be 0, or compile it with "
                'dynamic={"batch": (1, 8, 64)}'
            )
        return None, 0
    largest = model.dynamic[name][-1]
    if max_batch_size is not None and not 0 < max_batch_size <= largest:
        raise ServingError(
            f"max_batch_size must be from 0 to the largest compiled {name}, {largest}, got {max_batch_size}"
        )
    return name, max_batch_size or largest


def configuration(
    model: Any,
    *,
    name: str,
    batch: str | None,
    max_batch_size: int,
    batching: Batching | None,
    instances: Mapping[str, Any],
    dtypes: Mapping[str, str],
) -> str:
    """config.pbtxt."""

    def tensor(spec: Any) -> dict[str, Any]:
        shape = spec.shape[1:] if batch is not None else spec.shape
        dims = [-1 if isinstance(n, str) else n for n in shape]
        data_type = wire.Word(f"TYPE_{wire.TRITON_DTYPES[dtypes.get(spec.name, spec.dtype)]}")
        if dims:
            return dict(name=spec.name, data_type=data_type, dims=dims)
        if batch is None:
            raise ServingError(f"{spec.name} is a scalar, which Triton cannot transport: give it a dimension of size 1")
        # A number for each row: Triton has no empty dims.
        return dict(name=spec.name, data_type=data_type, dims=[1], reshape=dict(shape=[]))

    unknown = sorted(s.dtype for s in (*model.inputs, *model.outputs) if s.dtype not in wire.TRITON_DTYPES)
    if unknown:
        raise ServingError(f"Triton has no name for the dtype {unknown[0]}; it has {', '.join(wire.TRITON_DTYPES)}")
    fields: dict[str, Any] = dict(
        name=name,
        backend="python",
        max_batch_size=max_batch_size,
        input=[tensor(s) for s in model.inputs],
        output=[tensor(s) for s in model.outputs],
        instance_group=[instances],
    )
    if batching is not None:
        policy = dict(max_queue_size=batching.max_queue_size) if batching.max_queue_size else {}
        fields["dynamic_batching"] = dict(
            max_queue_delay_microseconds=batching.max_queue_delay_us,
            **(dict(default_queue_policy=policy) if policy else {}),
        )
    return wire.text(fields) + "\n"


def _batching(given: bool | Batching | Mapping[str, int]) -> Batching | None:
    if isinstance(given, bool):
        return Batching() if given else None
    if isinstance(given, Batching):
        return given
    known = {f.name for f in dataclasses.fields(Batching)}
    if not set(given) <= known:
        raise ServingError(f"dynamic_batching takes {sorted(known)}, got {sorted(given)}")
    return Batching(**given)


def _instances(count: int, gpus: Sequence[int]) -> dict[str, Any]:
    if count < 1:
        raise ServingError(f"instances must be at least 1, got {count}")
    if gpus:
        return dict(count=count, kind=wire.Word("KIND_GPU"), gpus=list(gpus))
    return dict(count=count, kind=wire.Word("KIND_CPU"))


def _checked_dtypes(model: Any, dtypes: Mapping[str, str]) -> Mapping[str, str]:
    own = {s.name: s.dtype for s in model.inputs}
    for name, dtype in dtypes.items():
        if name not in own:
            raise ServingError(f"dtypes names {name!r}, the inputs are {sorted(own)}")
        if dtype != own[name] and dtype not in wire.WIDER.get(own[name], ()):
            allowed = (own[name], *wire.WIDER.get(own[name], ()))
            raise ServingError(f"clients may send {name} as {' or '.join(allowed)}, got {dtype}")
    return dtypes
