"""Runs other libraries' own tests of attention, norms and activations, with jax.jit and with zenith.jit in its place.

    python dev/run_library_suites.py [--work DIRECTORY] [--source jax=DIRECTORY] [--source equinox=DIRECTORY]

Flax ships its tests in PyPI's source distribution, and that of the installed version is fetched. JAX and Equinox do
not: give checkouts of them, of the installed versions (https://github.com/jax-ml/jax, for example at jax-v0.10.2;
https://github.com/patrick-kidger/equinox). All stay outside of the repository. What passes with jax.jit
must pass with zenith.jit: the exit code is 1 where a test does not, and the tests are named.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree

ROOT = pathlib.Path(__file__).parents[1]

# Arguments of pytest: files, and what is left out of them.
SUITES = {
    "flax": [
        "tests/linen/linen_activation_test.py",
        "tests/linen/linen_attention_test.py",
        "tests/nnx/nn/attention_test.py",
        "tests/nnx/nn/normalization_test.py",
    ],
    "jax": ["tests/nn_test.py", "-k", "not Initializer and not Scaled"],
    "equinox": ["tests/test_nn.py"],
}
SHIPPED = {"flax"}

# Before any test module is imported. zenith.jit calls jax.jit, which is why its two parts are put together here. Most
# tests call layers without jit: functions of jax.nn, and Equinox's layers, are fused call by call. But not softmax,
# whose residuals a test counts, nor attention, which without jit catches that CPUs refuse a float16 product.
PLUGIN = """
import collections, functools, importlib.util, inspect, os
import jax
import zenith_jax as zenith

def fused_call(function):
    @functools.wraps(function)
    def call(*args, **options):
        leaves, tree = jax.tree.flatten((args, options))
        arrays = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]
        def of_arrays(*values):
            full = list(leaves)
            for i, value in zip(arrays, values):
                full[i] = value
            args, options = jax.tree.unflatten(tree, full)
            return function(*args, **options)
        return zenith.fuse(of_arrays)(*(leaves[i] for i in arrays))
    return call

if os.environ["REPLACE_JIT"] == "1":
    zenith.configure(use_cost=False)
    for name in "gelu log_softmax logsumexp silu standardize swish".split():
        setattr(jax.nn, name, fused_call(getattr(jax.nn, name)))
    if importlib.util.find_spec("equinox"):
        import equinox
        for layer in vars(equinox.nn).values():
            if inspect.isclass(layer) and "__call__" in vars(layer):
                layer.__call__ = fused_call(layer.__call__)
    plain = jax.jit
    def jit(function=None, **options):
        if function is None:
            return lambda f: jit(f, **options)
        return plain(zenith.fuse(function), **options)
    jax.jit = jit
    fused = collections.Counter()
    from zenith_jax.passes import rewrite
    record = rewrite.record
    def counted(site):
        if site.fused:
            fused[site.op] += 1
        record(site)
    rewrite.record = counted
    def pytest_terminal_summary(terminalreporter):
        terminalreporter.write_line(f"sites fused: {dict(fused)}")
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=pathlib.Path, help="where sources are unpacked; default: a temporary folder")
    parser.add_argument("--source", action="append", default=[], metavar="LIBRARY=DIRECTORY", help="its checkout")
    parser.add_argument("--only", choices=sorted(SUITES), action="append", help="the library whose tests are run")
    options = parser.parse_args()
    sources = {name: pathlib.Path(path) for name, _, path in (s.partition("=") for s in options.source)}
    if not sources.keys() <= SUITES.keys():
        parser.error(f"--source is LIBRARY=DIRECTORY with one of {sorted(SUITES)}, got {options.source}")
    work = options.work or pathlib.Path(tempfile.mkdtemp(prefix="library-suites-"))
    work.mkdir(parents=True, exist_ok=True)
    (work / "zenith_in_place_of_jit.py").write_text(PLUGIN)
    broken = []
    for library, files in SUITES.items():
        if options.only and library not in options.only:
            continue
        if library not in sources and library not in SHIPPED:
            print(f"{library}: not run, its tests are in no package; --source {library}=DIRECTORY takes a checkout")
            continue
        folder = sources.get(library) or unpacked(library, work)
        before, after = (outcomes(folder, files, work, replace) for replace in (False, True))
        passed = {test for test, good in before.items() if good}
        lost = sorted(test for test in passed if not after.get(test))
        broken += lost
        print(f"{library}: {len(passed)} of {len(before)} pass with jax.jit, {sum(after.values())} with zenith.jit")
        print(*(f"  fails with zenith.jit only: {test}" for test in lost), sep="\n")
    return 1 if broken else 0


def unpacked(library: str, work: pathlib.Path) -> pathlib.Path:
    name = f"{library}-{importlib.metadata.version(library)}"
    if not (work / name).is_dir():
        archive = work / f"{name}.tar.gz"
        if not archive.is_file():
            wanted = name.replace("-", "==")
            command = ["pip", "download", "--no-binary", ":all:", "--no-deps", "--dest", str(work), wanted]
            subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(archive) as tar:
            tar.extractall(work, filter="data")
    return work / name


def outcomes(folder: pathlib.Path, files: list[str], work: pathlib.Path, replace: bool) -> dict[str, bool]:
    """{test: whether it passed}; skipped ones are left out."""
    xml = work / f"{folder.name}-{'zenith' if replace else 'jax'}.xml"
    paths = os.pathsep.join(p for p in (str(ROOT), str(work), os.environ.get("PYTHONPATH", "")) if p)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "zenith_in_place_of_jit", "-p", "no:cacheprovider"),
            *("-c", os.devnull, "--rootdir", str(folder), "--junitxml", str(xml), "--tb=line", *files),
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "REPLACE_JIT": str(int(replace))},
        capture_output=True,
        text=True,
        check=False,
    )
    print(*done.stdout.splitlines()[-3:], sep="\n")
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout + done.stderr)
    found = {}
    for case in ElementTree.parse(xml).iter("testcase"):
        if case.find("skipped") is None:
            name = f"{case.get('classname')}::{case.get('name')}"
            found[name] = case.find("failure") is None and case.find("error") is None
    return found


if __name__ == "__main__":
    raise SystemExit(main())
