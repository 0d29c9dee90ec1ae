"""`CompiledModel.save` and `zenith.load`: a compiled model as one file, docs/compile.md.

The file holds the programs that `jax.export` serialises, one for each platform and each size of the dynamic dimensions,
the parameters, and manifest.json, which says what they are. Loading needs neither the model's code nor its framework.
"""

from __future__ import annotations

import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.export as jax_export
import numpy as np

from zenith_jax import native
from zenith_jax.compiled import archive, buckets, structure
from zenith_jax.compiled.buckets import Spec
from zenith_jax.compiled.model import CompiledModel, Export, Interface
from zenith_jax.compiled.program import Program, Relaid, program
from zenith_jax.errors import SavedModelError
from zenith_jax.export import load_exported
from zenith_jax.frontends._source import missing
from zenith_jax.report import Report
from zenith_jax.version import __version__

FORMAT = 2  # raise it when a reader of the one before would misread the file
MANIFEST = "manifest.json"


def save(model: CompiledModel, path: pathlib.Path, platforms: Sequence[str] | None) -> pathlib.Path:
    """See `CompiledModel.save`."""
    _require_flatbuffers("saving a model")
    platforms = (platforms,) if isinstance(platforms, str) else tuple(platforms or (native.default_platform(),))
    if not native.PLATFORMS.keys() >= set(platforms):
        raise SavedModelError(f"platforms must be some of {(*native.PLATFORMS,)}, got {platforms}")
    if not path.parent.is_dir():
        raise SavedModelError(f"there is no folder {path.parent} to save {path.name} in")
    if path.exists() and not path.is_file():
        raise SavedModelError(f"{path} is no file that saving could replace: give the path of one")
    devices = {d for values in (model.parameters, model.folded) for p in values.values() for d in p.devices()}
    if len(devices) > 1:
        raise SavedModelError(f"the parameters are spread over {len(devices)} devices; a file holds programs for one")
    members, programs, taken, replaced = {}, [], set(), set()
    for platform in platforms:
        for sizes in buckets.combinations(model.dynamic):
            export = model.exported(platform, sizes)
            exported = export.program
            taken.update(export.arguments)
            replaced.update(export.replaced)
            name = "-".join(["programs/" + platform, *(f"{k}{n}" for k, n in sizes.items())]) + ".bin"
            members[name] = bytes(exported.serialize())
            programs.append(
                dict(
                    member=name,
                    platform=platform,
                    sizes=sizes,
                    arguments=export.arguments,
                    calling_convention=exported.calling_convention_version,
                    calls_kernels="@zenith_" in exported.mlir_module(),
                )
            )
    # A parameter that is only in values made of it is not written, the values are.
    gone = replaced - taken
    kept = {n: np.asarray(p) for n, p in model.parameters.items() if n not in gone}
    folded = {n: np.asarray(p) for n, p in model.folded.items() if n in taken}
    arrays = [*kept.values(), *folded.values()]
    face = model.interface
    manifest = dict(
        format=FORMAT,
        zenith=__version__,
        jax=jax.__version__,
        kernel_version=native.KERNEL_VERSION,
        name=model.name,
        framework=model.framework,
        mode=model.mode,
        precision=model.precision,
        platforms=platforms,
        programs=programs,
        arguments=face.arguments,
        dynamic=face.dynamic,
        inputs=[vars(s) for s in face.inputs],
        input_structure=structure.to_json(face.input_structure, "the inputs"),
        outputs=[vars(s) for s in face.outputs],
        output_structure=structure.to_json(face.output_structure, "the outputs"),
        parameters=[
            dict(name=n, shape=a.shape, dtype=str(a.dtype), offset=o, crc32=archive.checksum(a), folded=n not in kept)
            for n, a, o in zip((*kept, *folded), arrays, archive.offsets(arrays), strict=True)
        ],
        parameter_structure=None if gone else _parameter_structure(model),
        report=model.report.as_dict(),
    )
    members = {MANIFEST: json.dumps(manifest, indent=1).encode(), **members}
    archive.write(path, members, arrays)
    return path


def load(path: str | os.PathLike[str]) -> CompiledModel:
    """The model that `CompiledModel.save` wrote, for this machine: `zenith.load("model.zenith")(x)`.

    Inputs and outputs are JAX arrays whatever framework the model came from; `params` are those of the file, mapped
    into memory on a CPU. A program is compiled when it is called first: `warm_up()` compiles all.
    Raises SavedModelError for a file that is damaged, of another version, or for other platforms; MissingExtraError
    without the package flatbuffers; NativeError where it calls kernels that are not built here. A saved model is a
    program: its bytes are checked against damage, not against malice.
    """
    reader = archive.Reader(pathlib.Path(path))
    manifest = _manifest(reader)
    _require_flatbuffers("loading a model")
    try:
        return _model(reader, manifest)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise reader.damaged(f"{MANIFEST} is not as expected ({type(error).__name__}: {error})") from error


def _manifest(reader: archive.Reader) -> dict[str, Any]:
    """manifest.json, of a version that is read here."""
    try:
        manifest = json.loads(reader.member(MANIFEST))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise reader.damaged(f"{MANIFEST} is no JSON ({error})") from error
    if not isinstance(manifest, dict):
        raise reader.damaged(f"{MANIFEST} is no JSON object")
    if manifest.get("format") != FORMAT:
        raise SavedModelError(
            f"{reader.path} has format {manifest.get('format')!r}, this Zenith {__version__} reads format {FORMAT}: "
            f"install Zenith {manifest.get('zenith', '?')}, or save the model again"
        )
    return manifest


def _model(reader: archive.Reader, manifest: Mapping[str, Any]) -> CompiledModel:
    platform = native.default_platform()
    if platform not in manifest["platforms"]:
        raise SavedModelError(
            f"{reader.path} was saved for {', '.join(manifest['platforms'])}, JAX computes on {platform} here: save it "
            f"again with platforms={(*manifest['platforms'], platform)}"
        )
    entries = [p for p in manifest["programs"] if p["platform"] == platform]
    for entry in entries:
        _check_versions(reader.path, manifest, entry)
    dynamic = {name: tuple(sizes) for name, sizes in manifest["dynamic"].items()}
    arrays = {
        p["name"]: archive.on_device(reader.array(p["offset"], p["shape"], p["dtype"], p["crc32"]))
        for p in manifest["parameters"]
    }
    is_folded = {p["name"]: bool(p["folded"]) for p in manifest["parameters"]}
    arguments = {tuple(e["sizes"].values()): [arrays[n] for n in e["arguments"]] for e in entries}
    tree = manifest["parameter_structure"]
    exports = {tuple(e["sizes"].values()): _exported(reader, e) for e in entries}
    if set(exports) != {tuple(s.values()) for s in buckets.combinations(dynamic)}:
        raise reader.damaged("a program is missing")

    def exported(wanted: str, sizes: Mapping[str, int]) -> Export:
        found = next((p for p in manifest["programs"] if p["platform"] == wanted and p["sizes"] == dict(sizes)), None)
        if found is None:
            raise SavedModelError(
                f"a model that was loaded has the programs of its file, for {', '.join(manifest['platforms'])}: to "
                f"have one for {wanted}, save the original"
            )
        return Export(_exported(reader, found), tuple(found["arguments"]))

    report = manifest["report"]
    return CompiledModel(
        name=manifest["name"],
        framework=manifest["framework"],
        mode=manifest["mode"],
        precision=manifest["precision"],
        parameters={n: x for n, x in arrays.items() if not is_folded[n]},
        folded={n: x for n, x in arrays.items() if is_folded[n]},
        parameter_structure=None if tree is None else structure.from_json(tree),
        report=Report.from_dict(report),
        interface=Interface(
            inputs=_specs(manifest["inputs"]),
            outputs=_specs(manifest["outputs"]),
            input_structure=structure.from_json(manifest["input_structure"]),
            output_structure=structure.from_json(manifest["output_structure"]),
            arguments=tuple(manifest["arguments"]),
            dynamic=dynamic,
        ),
        programs=_Programs(exports, arguments, dynamic, _specs(manifest["inputs"]), manifest["mode"]),
        exported=exported,
    )


class _Programs(dict):
    """{sizes: program}, each compiled when it is asked for first."""

    def __init__(
        self, exports: Mapping[Any, Any], arguments: Mapping[Any, Any], dynamic: Any, specs: Sequence[Spec], mode: str
    ):
        super().__init__()
        relaid = Relaid()

        def compiled(sizes: tuple[int, ...]) -> Program:
            structs = [s.struct(dict(zip(dynamic, sizes, strict=True))) for s in specs]
            return program(jax.jit(exports[sizes].call), arguments[sizes], structs, mode, relaid, time.perf_counter())

        self._compile = compiled

    def __missing__(self, sizes: Any) -> Any:
        self[sizes] = self._compile(sizes)
        return self[sizes]


def _check_versions(path: pathlib.Path, manifest: Mapping[str, Any], entry: Mapping[str, Any]) -> None:
    oldest = jax_export.minimum_supported_calling_convention_version
    newest = jax_export.maximum_supported_calling_convention_version
    if not oldest <= entry["calling_convention"] <= newest:
        advice = "a newer jax" if entry["calling_convention"] > newest else f"jax {manifest['jax']}"
        raise SavedModelError(
            f"{path} was saved with jax {manifest['jax']}, in version {entry['calling_convention']} of jax.export's "
            f"calling convention; jax {jax.__version__} reads {oldest} to {newest}: install {advice}, or save the "
            "model again"
        )
    if entry["calls_kernels"] and manifest["kernel_version"] != native.KERNEL_VERSION:
        raise SavedModelError(
            f"{path} calls Zenith's kernels of version {manifest['kernel_version']}, from Zenith {manifest['zenith']}; "
            f"Zenith {__version__} has version {native.KERNEL_VERSION}: install the other, or save the model again"
        )


def _exported(reader: archive.Reader, entry: Mapping[str, Any]) -> Any:
    content = reader.member(entry["member"])
    try:
        return load_exported(content)
    except (ValueError, KeyError, IndexError, AssertionError) as error:  # what flatbuffers and MLIR raise
        raise reader.damaged(f"{entry['member']} is no program that jax {jax.__version__} reads ({error})") from error


def _specs(given: Sequence[Mapping[str, Any]]) -> tuple[Spec, ...]:
    return tuple(Spec(s["name"], tuple(s["shape"]), s["dtype"]) for s in given)


def _parameter_structure(model: CompiledModel) -> Any:
    """As JSON; None where it has a framework's classes in it, so that a loaded model has a dict by path."""
    if model.parameter_structure is None or not model.parameter_structure.is_plain:
        return None
    try:
        return structure.to_json(model.parameter_structure, "the parameters")
    except SavedModelError:
        return None


def _require_flatbuffers(what: str) -> None:
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        raise missing(f"{what}, by jax.export,", "flatbuffers", "serving") from error
