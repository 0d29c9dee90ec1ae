"""Imports go down only, and JAX's private modules are known to one file: read off the sources with `ast`."""

import ast
import pathlib

import pytest

import zenith_jax

PACKAGE = pathlib.Path(zenith_jax.__file__).parent

# A file may import from layers below its own, and from its own package. docs/architecture.md draws this.
LAYERS = [
    {"cli"},
    {"cache_command", "compile_command", "onnx_command", "run_command", "serve_command"},
    {"demo", "bench", "explain_command"},
    {"__init__"},  # the public names: what `import zenith_jax` gives
    {"serving"},
    {"compiled"},
    {"verify", "register", "export"},
    {"frontends"},
    {"api"},
    {"doctor", "passes"},
    {"borrowed", "telemetry", "ops"},
    {"ir", "native", "report"},
    {"report_html"},
    {"config", "device", "errors", "files", "version"},
]
HEIGHT = {name: -depth for depth, layer in enumerate(LAYERS) for name in layer}
# A layer that sees only part of the ones below it.
ONLY = {
    "ops": {"zenith_jax.ops", "zenith_jax.ir._compat", "zenith_jax.native", "zenith_jax.errors"},
    "ir": {"zenith_jax.ir"},
    "native": {"zenith_jax.errors"},
    "doctor": {"zenith_jax.native"},
    "report": {"zenith_jax.report_html"},
    "report_html": set(),
    "config": set(),
    "errors": set(),
}
SOURCES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in SOURCES]


def layer_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: pathlib.Path) -> set[str]:
    """Modules that a file imports, anywhere in it; `from a import b` is a.b where that is a module of ours, else a."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {_module(node.module, alias.name) for alias in node.names}
    return found


def _module(package: str, name: str) -> str:
    path = PACKAGE.parent.joinpath(*package.split("."), name)
    is_module = path.is_dir() or path.with_suffix(".py").is_file()
    return f"{package}.{name}" if package.startswith("zenith_jax") and is_module else package


def layer_imported(module: str) -> str:
    return module.removeprefix("zenith_jax").lstrip(".").partition(".")[0] or "__init__"


def upward(path: pathlib.Path) -> list[str]:
    """Imports of the file that its layer may not make."""
    own = layer_of(path)
    wrong = []
    for module in imports(path):
        if not module.startswith("zenith_jax"):
            continue
        other = layer_imported(module)
        peers = {own, "demo", "bench"} if own in ("demo", "bench") else {own}
        if other not in peers and HEIGHT[other] >= HEIGHT[own]:
            wrong.append(f"{own} imports {module}")
        if own in ONLY and not any(module == a or module.startswith(a + ".") for a in ONLY[own]):
            wrong.append(f"{own} imports {module}, only {sorted(ONLY[own])} are allowed")
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_imports_go_down_only(path):
    assert layer_of(path) in HEIGHT, f"put {layer_of(path)} into LAYERS"
    assert upward(path) == []


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_private_modules_of_jax_are_imported_in_compat_only(path):
    if path != PACKAGE / "ir" / "_compat.py":
        assert not [m for m in imports(path) if m.startswith(("jax._src", "jaxlib._"))]


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_only_lower_makes_custom_calls(path):
    text = path.read_text()
    if path != PACKAGE / "ops" / "_lower.py":
        assert "ffi_call" not in text and "ffi_lowering" not in text


def test_an_upward_import_is_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "errors.py").write_text("def late():\n    from zenith_jax.api import jit\n    return jit\n")
    assert "errors imports zenith_jax.api" in upward(tmp_path / "errors.py")
