"""CompiledModel.save and zenith.load: one file, read without the model's code; damaged ones are refused."""

from __future__ import annotations

import json
import os
import pathlib
import struct
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zenith_jax as zenith
from zenith_jax import native
from zenith_jax.compiled import archive
from zenith_jax.errors import InputError, MissingExtraError, SavedModelError

pytest.importorskip("flatbuffers", reason="jax.export serialises with it")

X = np.sin(np.arange(3 * 8, dtype=np.float32)).reshape(3, 8)
PARAMS = {
    "half": jnp.arange(8, dtype=jnp.bfloat16),
    "layers": [{"w": jnp.cos(jnp.arange(8 * 64.0)).reshape(8, 64)}, {"w": jnp.ones((64, 4))}],
    "empty": jnp.zeros((0, 3)),
}


def apply(params, x):
    hidden = jax.nn.softmax((x * params["half"]) @ params["layers"][0]["w"])
    return {"y": hidden @ params["layers"][1]["w"], "empty": params["empty"], "pair": (x, [hidden.sum()]), "no": None}


@pytest.fixture(scope="module")
def model():
    with zenith.configured(use_cost=False):
        return zenith.compile((apply, PARAMS), X)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> pathlib.Path:
    return model.save(tmp_path_factory.mktemp("saved") / "model.zenith")


def changed(whole: pathlib.Path, path: pathlib.Path, **changes) -> pathlib.Path:
    """A copy of the file with other entries in its manifest."""
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename == "manifest.json":
                content = json.dumps({**json.loads(content), **changes}).encode()
            new.writestr(info.filename, content)
    return path


def test_a_loaded_model_is_the_saved_one(model, whole):
    loaded = zenith.load(whole)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), loaded(X), model(X))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)
    assert loaded.params["half"].dtype == jnp.bfloat16
    assert (loaded.name, loaded.framework, loaded.mode) == ("apply", "jax", "default")
    assert loaded.inputs == model.inputs
    assert loaded.outputs == model.outputs
    assert loaded.report.counts() == model.report.counts() == {"softmax": 1}
    with pytest.raises(InputError, match=r"apply was compiled for x: float32\[3, 8\]; x has shape \(1, 8\)"):
        loaded(X[:1])


def test_a_loaded_model_can_be_saved_again(whole, tmp_path):
    again = zenith.load(whole).save(tmp_path / "again.zenith")
    assert again.read_bytes() == whole.read_bytes()


def test_parameters_are_mapped_and_aligned(whole):
    with zipfile.ZipFile(whole) as file:
        manifest = json.loads(file.read("manifest.json"))
    reader = archive.Reader(whole)
    start, _ = reader._arrays_span()
    assert start % archive.ALIGNMENT == 0
    for entry in manifest["parameters"]:
        array = reader.array(entry["offset"], entry["shape"], entry["dtype"], entry["crc32"])
        assert array.nbytes == 0 or array.ctypes.data % archive.ALIGNMENT == 0
        assert array.base is not None or array.nbytes == 0
    if jax.default_backend() == "cpu":
        weight = zenith.load(whole).params["layers"][0]["w"]
        maps = pathlib.Path("/proc/self/maps").read_text()
        (span,) = {line.split()[0] for line in maps.splitlines() if line.endswith(whole.name) and _holds(line, weight)}
        assert span


def _holds(line: str, array: jax.Array) -> bool:
    begin, end = (int(n, 16) for n in line.split()[0].split("-"))
    return begin <= array.unsafe_buffer_pointer() < end


LOAD = """
import sys
import numpy as np
import zenith_jax as zenith
model = zenith.load(sys.argv[1])
x = np.load(sys.argv[2])
np.testing.assert_allclose(model(x)["y"], np.load(sys.argv[3]), atol=1e-6)
foreign = {"flax", "equinox", "torch", "onnx", "tensorflow"} & set(sys.modules)
assert not foreign, foreign
"""


def test_loading_needs_no_model_code_and_no_framework(model, whole, tmp_path):
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", model(X)["y"])
    command = [sys.executable, "-c", LOAD, str(whole), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_every_size_of_a_dynamic_dimension_is_in_the_file(tmp_path):
    compiled = zenith.compile(lambda x: jnp.tanh(x) * 2, X, dynamic={"batch": (1, 4)})
    loaded = zenith.load(compiled.save(tmp_path / "m.zenith"))
    loaded.warm_up()
    for n in (1, 2, 4):
        np.testing.assert_allclose(loaded(np.ones((n, 8), np.float32)), np.full((n, 8), 2 * np.tanh(1)), rtol=1e-6)


def test_parameters_of_a_frameworks_classes_come_back_by_path(tmp_path):
    nnx = pytest.importorskip("flax.nnx")
    module = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    loaded = zenith.load(zenith.compile(module, X).save(tmp_path / "m.zenith"))
    np.testing.assert_allclose(loaded(X), module(X), atol=1e-6)
    assert {p.split(".")[0]: a.shape for p, a in loaded.params.items()} == {"bias": (4,), "kernel": (8, 4)}


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(whole, tmp_path, part):
    short = tmp_path / "short.zenith"
    short.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * part)])
    with pytest.raises(SavedModelError, match=r"short.zenith \(\d+ bytes\) is truncated, or another kind of file"):
        zenith.load(short)


def damaged(content: bytes, position: int, flip: int) -> bytes:
    return content[:position] + bytes([content[position] ^ flip]) + content[position + 1 :]


def test_every_damaged_byte_is_found_or_harmless(model, whole, tmp_path):
    content = whole.read_bytes()
    want = np.asarray(model(X)["y"])
    bad, found = tmp_path / "bad.zenith", 0
    for position in range(0, len(content), len(content) // 60):
        bad.write_bytes(damaged(content, position, 0x41))
        try:
            loaded = zenith.load(bad)
        except SavedModelError as error:
            assert "bad.zenith" in str(error)
            found += 1
        else:  # in the padding between arrays, or a time in a header
            np.testing.assert_allclose(loaded(X)["y"], want, rtol=1e-6)
    assert found > 40


def test_every_damaged_byte_of_the_archive_is_found_or_harmless(whole, tmp_path):
    """Every byte that is no array's: headers and the table of contents, which `zipfile` reads."""
    content, bad = whole.read_bytes(), tmp_path / "bad.zenith"
    with zipfile.ZipFile(whole) as archive_:
        members = {name: archive_.read(name) for name in archive_.namelist() if name != archive.ARRAYS}
        arrays = archive_.getinfo(archive.ARRAYS)
    table = content.rindex(b"PK\5\6")
    start = struct.unpack("<I", content[table + 16 : table + 20])[0]
    headers = [i.header_offset + n for i in archive_.infolist() for n in range(archive._LOCAL_HEADER + len(i.filename))]
    assert arrays.header_offset < start
    for position in [*headers, *range(start, len(content))]:
        for flip in (0x01, 0x41, 0xFF):
            bad.write_bytes(damaged(content, position, flip))
            try:
                reader = archive.Reader(bad)
                read = {name: reader.member(name) for name in members}
                span = reader._arrays_span()
            except SavedModelError as error:
                assert "bad.zenith" in str(error)
            else:
                assert read == members, position
                assert span[1] <= len(content)


def test_what_is_no_file_of_ours_is_refused(tmp_path):
    with pytest.raises(SavedModelError, match="there is no file"):
        zenith.load(tmp_path / "nowhere.zenith")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("hello.txt", "hello")
    with pytest.raises(SavedModelError, match=r"is no saved model, or damaged: it holds no manifest\.json"):
        zenith.load(tmp_path / "other.zip")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(format=3, zenith="9.0"), r"has format 3, this Zenith .* reads format 2: install Zenith 9.0, or save"),
        (dict(platforms=["cuda"]), r"was saved for cuda, JAX computes on cpu here: save it again with platforms="),
        (dict(inputs=3), r"manifest.json is not as expected \(TypeError"),
        (dict(programs=[]), "a program is missing"),
    ],
)
def test_other_versions_and_platforms_are_refused(whole, tmp_path, changes, message):
    with pytest.raises(SavedModelError, match=message):
        zenith.load(changed(whole, tmp_path / "m.zenith", **changes))


def test_another_version_of_the_kernels_is_refused(whole, tmp_path):
    message = rf"calls Zenith's kernels of version 99, from Zenith .* has version {native.KERNEL_VERSION}: install"
    with zipfile.ZipFile(whole) as file:
        (program,) = json.loads(file.read("manifest.json"))["programs"]
    other = changed(whole, tmp_path / "m.zenith", kernel_version=99, programs=[{**program, "calls_kernels": True}])
    with pytest.raises(SavedModelError, match=message):
        zenith.load(other)


@pytest.mark.parametrize(("version", "advice"), [(1, "install jax 0"), (999, "install a newer jax")])
def test_another_calling_convention_is_refused(whole, tmp_path, version, advice):
    with zipfile.ZipFile(whole) as file:
        (program,) = json.loads(file.read("manifest.json"))["programs"]
    other = changed(whole, tmp_path / "m.zenith", programs=[{**program, "calling_convention": version}])
    with pytest.raises(SavedModelError, match=rf"in version {version} of jax.export's calling convention.*{advice}"):
        zenith.load(other)


def test_outputs_that_need_code_are_refused(tmp_path):
    module = pytest.importorskip("flax.struct")

    @module.dataclass
    class Result:
        y: jax.Array

    compiled = zenith.compile(lambda x: Result(x), X)
    with pytest.raises(SavedModelError, match=r"the outputs hold a .*Result, which a file cannot rebuild"):
        compiled.save(tmp_path / "m.zenith")
    assert not list(tmp_path.iterdir())


def test_saving_into_no_folder_is_refused(model, tmp_path):
    with pytest.raises(SavedModelError, match="there is no folder"):
        model.save(tmp_path / "nowhere" / "m.zenith")


def test_what_is_no_file_is_not_replaced(model, tmp_path):
    (tmp_path / "link").symlink_to("/dev/null")
    for path in (tmp_path, tmp_path / "link"):
        with pytest.raises(SavedModelError, match="is no file that saving could replace"):
            model.save(path)


def test_unknown_platforms_are_refused(model, tmp_path):
    for platforms in ("tpu", ("cpu", "gpu")):
        with pytest.raises(SavedModelError, match=r"platforms must be some of \('cpu', 'cuda'\)"):
            model.save(tmp_path / "m.zenith", platforms=platforms)


def test_without_flatbuffers_the_extra_is_named(model, whole, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    for action in (lambda: zenith.load(whole), lambda: model.save(tmp_path / "m.zenith")):
        with pytest.raises(MissingExtraError, match=r"package flatbuffers: pip install 'zenith-jax\[serving\]'"):
            action()


FULL = """
import resource, signal, sys
import numpy as np, jax.numpy as jnp
import zenith_jax as zenith
path = sys.argv[1]
model = zenith.compile((lambda p, x: x @ p, jnp.ones((512, 512))), np.ones((1, 512), np.float32))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit fails with an error, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    model.save(path)
except OSError as error:
    print("refused", error)
"""


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_what_was_there(whole, tmp_path, existing):
    path = tmp_path / "m.zenith"
    if existing:
        path.write_bytes(whole.read_bytes())
    command = [sys.executable, "-c", FULL, str(path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("refused"), done.stdout + done.stderr
    assert os.listdir(tmp_path) == (["m.zenith"] if existing else [])
    assert not existing or path.read_bytes() == whole.read_bytes()
