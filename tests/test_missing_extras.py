"""Without an optional package `import zenith_jax` works, and its door names the extra that installs it."""

import importlib.util

import pytest

import zenith_jax as zenith
from zenith_jax.errors import MissingExtraError


@pytest.fixture
def without(monkeypatch):
    find_spec = importlib.util.find_spec

    def hide(package):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *a: None if name == package else find_spec(name, *a)
        )

    return hide


@pytest.mark.parametrize(
    "door, package, extra",
    [("torch", "torch", "torch"), ("torch", "onnxscript", "torch"), ("tensorflow", "tensorflow", "tensorflow")],
)
def test_the_door_names_its_extra(without, door, package, extra):
    without(package)
    if package != door and importlib.util.find_spec(door) is None:
        pytest.skip(f"{door} is missing too")
    with pytest.raises(MissingExtraError, match=rf"needs the package {package}: pip install 'zenith-jax\[{extra}\]'"):
        getattr(zenith, door).compile(None)
