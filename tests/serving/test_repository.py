"""What is written, and that it appears whole or not at all. No server."""

from __future__ import annotations

import json
import os
import runpy
import sys
import threading
import types
import zipfile

import jax
import jax.numpy as jnp
import pytest
from serving_models import compiled_mlp

import zenith_jax as zenith
from zenith_jax.errors import ServingError
from zenith_jax.serving import ahead, wire
from zenith_jax.serving import repository as module
from zenith_jax.serving.repository import Batching, batch_dimension

QUICK = dict(ahead_of_time=False)


@pytest.fixture
def repository(tmp_path):
    return zenith.serving.TritonModelRepository(tmp_path / "models")


def test_the_files_of_a_model(repository, compiled):
    folder = repository.add(compiled, name="mlp", max_batch_size=8, dynamic_batching=Batching(100, 7), **QUICK)
    assert folder == repository.path / "mlp" / "1"
    assert sorted(p.name for p in folder.iterdir()) == ["model.py", "model.zenith", "serving.json"]
    assert (folder.parent / "config.pbtxt").read_text() == (
        'name: "mlp"\nbackend: "python"\nmax_batch_size: 8\n'
        'input {\n  name: "x"\n  data_type: TYPE_FP32\n  dims: [16]\n}\n'
        'output {\n  name: "largest"\n  data_type: TYPE_FP32\n  dims: [1]\n  reshape {\n    shape: []\n  }\n}\n'
        'output {\n  name: "probabilities"\n  data_type: TYPE_FP32\n  dims: [8]\n}\n'
        "instance_group {\n  count: 1\n  kind: KIND_CPU\n}\n"
        "dynamic_batching {\n  max_queue_delay_microseconds: 100\n"
        "  default_queue_policy {\n    max_queue_size: 7\n  }\n}\n"
    )
    assert list(repository.path.parent.iterdir()) == [repository.path]  # nothing staged is left


def test_instances_on_gpus(repository, compiled):
    folder = repository.add(compiled, name="m", instances=2, gpus=(0, 3), dynamic_batching=False, **QUICK)
    text = (folder.parent / "config.pbtxt").read_text()
    assert "count: 2\n  kind: KIND_GPU\n  gpus: [0, 3]" in text and "dynamic_batching" not in text
    assert '"memory_fraction": 0.45' in (folder / "serving.json").read_text()


@pytest.mark.parametrize(("gpus", "platform"), [((), "cpu"), ((1,), "cuda")])
def test_a_model_is_saved_for_where_its_instances_are(repository, compiled, gpus, platform):
    folder = repository.add(compiled, name="m", gpus=gpus, **QUICK)
    with zipfile.ZipFile(folder / "model.zenith") as file:
        assert json.loads(file.read("manifest.json"))["platforms"] == [platform]


def test_programs_for_the_cpu_are_compiled_there(repository, compiled, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")  # as on a machine with a GPU, where the compiling process would take it
    folder = repository.add(compiled, name="m")
    assert (folder / "cache").is_dir()


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="JAX has a GPU")
def test_programs_for_gpus_cannot_be_compiled_without_one(repository, compiled):
    with pytest.raises(ServingError, match=r"GPUs \[0\] cannot be compiled ahead .* ahead_of_time=False"):
        repository.add(compiled, name="m", gpus=(0,))


@pytest.mark.parametrize("gpus", [(), (1, 3)])
def test_the_configuration_is_what_tritons_protocol_reads(repository, compiled, gpus):
    """Parsed by the message ModelConfig that NVIDIA's client brings, field by field."""
    model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    batching = Batching(max_queue_delay_us=100, max_queue_size=7)
    folder = repository.add(compiled, name="m", instances=2, gpus=gpus, dynamic_batching=batching, **QUICK)
    text = (folder.parent / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config.ModelConfig())  # raises for a field that it does not know
    (group,) = config.instance_group
    kinds = model_config.ModelInstanceGroup
    assert (group.count, list(group.gpus)) == (2, list(gpus))
    assert group.kind == (kinds.KIND_GPU if gpus else kinds.KIND_CPU)
    assert (config.name, config.backend, config.max_batch_size) == ("m", "python", 16)
    assert config.dynamic_batching.max_queue_delay_microseconds == 100
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 7
    assert [(t.name, t.data_type, list(t.dims)) for t in config.input] == [("x", model_config.TYPE_FP32, [16])]
    assert [(t.name, list(t.dims), t.HasField("reshape")) for t in config.output] == [
        ("largest", [1], True),
        ("probabilities", [8], False),
    ]


def started(folder, monkeypatch, kind, names) -> dict[str, str | None]:
    """The version's model.py, told what Triton tells it: the environment in which it would import JAX."""
    for name in names:
        monkeypatch.setenv(name, os.environ.get(name, ""))  # restored behind the test
        if not os.environ[name]:
            monkeypatch.delenv(name)
    backends = []
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", types.ModuleType("triton_python_backend_utils"))
    monkeypatch.setattr("zenith_jax.serving.backend.Backend", lambda *args: backends.append(args))
    instance = runpy.run_path(str(folder / "model.py"))["TritonPythonModel"]()
    device = {"model_instance_kind": kind, "model_instance_device_id": "1"}
    instance.initialize({"model_repository": str(folder.parent), "model_version": "1", **device})
    assert [args[0] for args in backends] == [folder]
    return {name: os.environ.get(name) for name in names}


@pytest.mark.parametrize(
    ("kind", "visible", "expected"),
    [
        ("GPU", "", {"CUDA_VISIBLE_DEVICES": "1", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45", "JAX_PLATFORMS": None}),
        ("GPU", "4,6", {"CUDA_VISIBLE_DEVICES": "6", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45", "JAX_PLATFORMS": None}),
        ("CPU", "", {"CUDA_VISIBLE_DEVICES": None, "XLA_PYTHON_CLIENT_MEM_FRACTION": None, "JAX_PLATFORMS": "cpu"}),
    ],
)
def test_an_instance_has_its_device_to_itself(repository, compiled, monkeypatch, kind, visible, expected):
    """Triton counts the GPUs that CUDA_VISIBLE_DEVICES leaves it."""
    folder = repository.add(compiled, name="m", instances=2, gpus=(0, 1), **QUICK)
    for name in expected:
        monkeypatch.setenv(name, visible if name == "CUDA_VISIBLE_DEVICES" else "")
    assert started(folder, monkeypatch, kind, expected) == expected


@pytest.mark.parametrize("threads", ahead.POOL_THREADS)
def test_an_instance_has_the_threads_that_were_faster(repository, compiled, monkeypatch, threads):
    """Measured ahead of time; here, so that one is clearly ahead."""
    monkeypatch.setattr(ahead, "processors", lambda: 8)

    class Process:
        def __init__(self, version, these, of_cpu):
            assert of_cpu
            (version / f"cache-{these.replace(' ', '-')}").mkdir()
            (version / f"cache-{these.replace(' ', '-')}" / these).touch()
            self.seconds = 0.001 if these == threads else 0.002

        def measure(self):
            return [([1], self.seconds), ([4], 0.002), ([16], 0.004)]

        answer = measure
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731

    monkeypatch.setattr(ahead, "_Process", Process)
    with zenith.configured(use_cost=False):
        fused = compiled_mlp()
    assert fused.report.fused
    folder = repository.add(fused, name="m")
    assert sorted(p.name for p in folder.iterdir()) == ["cache", "model.py", "model.zenith", "serving.json"]
    assert [p.name for p in (folder / "cache").iterdir()] == [threads]
    settings = json.loads((folder / "serving.json").read_text())
    assert settings["seconds"] == [[[1], 0.001], [[4], 0.002], [[16], 0.004]]
    monkeypatch.setenv("NPROC", "")
    expected = None if threads == "all" else str(max(1, len(os.sched_getaffinity(0)) - 1))
    assert started(folder, monkeypatch, "CPU", ["NPROC", "JAX_PLATFORMS"])["NPROC"] == expected


def test_versions_follow_each_other(repository, compiled, tmp_path):
    saved = compiled.save(tmp_path / "saved.zenith")
    assert repository.add(compiled, name="m", **QUICK).name == "1"
    assert repository.add(saved, name="m", **QUICK).name == "2"
    assert repository.add(saved, name="m", version=7, **QUICK).name == "7"
    assert repository.versions("m") == [1, 2, 7]
    with pytest.raises(ServingError, match=r"versions \[1, 2, 7\]"):
        repository.add(saved, name="m", version=2, **QUICK)


def test_a_version_that_cannot_be_compiled_never_appears(repository, compiled, monkeypatch):
    def broken(version, **_):
        raise ServingError("as a server would")

    monkeypatch.setattr(ahead, "compile_ahead", broken)
    with pytest.raises(ServingError, match="as a server would"):
        repository.add(compiled, name="m")
    assert list(repository.path.iterdir()) == []
    assert list(repository.path.parent.iterdir()) == [repository.path]


def test_whoever_looks_sees_whole_versions_only(repository, compiled):
    """A reader that lists the folder all the time, as a polling server does, finds no version without its files."""
    stop, partial = threading.Event(), []

    def look():
        while not stop.is_set():
            for folder in repository.path.glob("m/[0-9]*"):
                if len(list(folder.iterdir())) != 3 or not (folder.parent / "config.pbtxt").is_file():
                    partial.append(folder)

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(5):
        repository.add(compiled, name="m", **QUICK)
    stop.set()
    thread.join()
    assert partial == [] and repository.versions("m") == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(name="../m"), "letters, digits"),
        (dict(name=""), "letters, digits"),
        (dict(max_batch_size=17), "largest compiled batch, 16, got 17"),
        (dict(max_batch_size=-1), "got -1"),
        (dict(instances=0), "at least 1"),
        (dict(version=0), "from 1, got 0"),
        (dict(dtypes={"z": "int64"}), r"names 'z', the inputs are \['x'\]"),
        (dict(dtypes={"x": "int64"}), "float32 or float64, got int64"),
        (dict(dynamic_batching={"delay": 3}), "takes"),
    ],
)
def test_wrong_options(repository, compiled, options, message):
    with pytest.raises(ServingError, match=message):
        repository.add(compiled, **{"name": "m", **QUICK, **options})
    assert not (repository.path / "m").exists()


def test_only_a_leading_dimension_of_everything_is_a_batch(compiled):
    assert batch_dimension(compiled, None) == ("batch", 16)
    assert batch_dimension(compiled, 0) == (None, 0)
    fixed = zenith.compile(lambda x: x + 1, jnp.ones((2, 3)))
    assert batch_dimension(fixed, None) == (None, 0)
    with pytest.raises(ServingError, match="max_batch_size must be 0"):
        batch_dimension(fixed, 8)


def test_a_scalar_result_is_refused(repository):
    model = zenith.compile(lambda x: x.sum(), jnp.ones((2, 3)))
    with pytest.raises(ServingError, match="a scalar"):
        repository.add(model, name="m", **QUICK)


def test_text_protobuf():
    assert wire.text({"a": 'q"\\\n', "b": wire.Word("K"), "c": [1, -1], "d": [{"e": True}], "f": {"g": []}}) == (
        'a: "q\\042\\134\\012"\nb: K\nc: [1, -1]\nd {\n  e: true\n}\nf {\n  g: []\n}'
    )


def test_names_of_anything_become_a_models_name(repository):
    model = zenith.compile(jax.jit(lambda x: x * 2), jnp.ones((2, 3)))
    assert module._NAME.fullmatch(repository.add(model, **QUICK).parent.name)
