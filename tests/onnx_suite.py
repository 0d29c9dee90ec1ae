"""ONNX's official backend suite against the importer: cases, one run of one case, and a table of scores.

    python tests/onnx_suite.py                       the whole suite
    python tests/onnx_suite.py --only resize,pad     cases whose name matches one of the regular expressions
    python tests/onnx_suite.py --only gru -v         with the traceback of each failure
    python tests/onnx_suite.py --eager               node by node, without jax.jit

A case passes if shape, dtype and values are what the suite's own comparison accepts. It is run under `jax.jit` with
every input traced that need not be known while tracing, and node by node only where its shapes depend on data. Random
numbers, whose algorithm ONNX leaves open, are "random" where shape and dtype are right and the values possible ones.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import glob
import io
import os
import pathlib
import re
import sys
import time
import traceback
import warnings
from typing import Any

import numpy as np
from quick_compiler import NEW_EMITTERS

JIT, EAGER, STATIC = "jit", "eager", "static"  # how a case was run; static: no input was traced
PASS, UNSUPPORTED, RANDOM, WRONG, ERROR = "pass", "unsupported", "random", "wrong", "error"


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    kind: str
    model: Any  # ModelProto
    data: list[tuple[list[Any], list[Any]]]
    rtol: float
    atol: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    name: str
    kind: str
    result: str
    how: str
    seconds: float
    reason: str = ""
    trace: str = ""


def names() -> list[str]:
    """The names of all cases, sorted."""
    _load_all()
    return sorted(_CASES)


def _all() -> dict[str, Any]:
    """Every TestCase of the installed onnx by name. Node cases are computed by the import, with warnings of NumPy."""
    from onnx.backend.test.loader import load_model_tests

    cases = {}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for kind in ("node", "real", "simple", "pytorch-converted", "pytorch-operator"):
            for case in load_model_tests(kind=kind):
                cases[case.name] = case
    return cases


def case(name: str) -> Case:
    _load_all()
    return _case(_CASES[name])


_CASES: dict[str, Any] = {}


def _load_all() -> None:
    if not _CASES:
        _CASES.update(_all())


def _case(test: Any) -> Case:
    import onnx

    if test.model is not None:
        data = [([_array(v) for v in inputs], [_array(v) for v in outputs]) for inputs, outputs in test.data_sets]
        return Case(test.name, test.kind, test.model, data, test.rtol, test.atol)
    if test.model_dir is not None:
        model = onnx.load(os.path.join(test.model_dir, "model.onnx"))
        data = [_stored(folder, model) for folder in sorted(glob.glob(os.path.join(test.model_dir, "test_data_set*")))]
        return Case(test.name, test.kind, model, data, test.rtol, test.atol)
    path = pathlib.Path(onnx.__file__).parent.joinpath(*pathlib.PurePosixPath(test.url).parts[1:])
    model = onnx.load(path)
    initializers = {i.name for i in model.graph.initializer}
    inputs = [_dummy(i) for i in model.graph.input if i.name not in initializers]
    stem = str(path).removesuffix(".onnx")
    outputs = [_tensor(f"{stem}_output_{i}.pb") for i in range(len(model.graph.output))]
    return Case(test.name, test.kind, model, [(inputs, outputs)], test.rtol, test.atol)


def _array(value: Any) -> Any:
    import onnx

    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def _dummy(info: Any) -> np.ndarray:
    """What the suite feeds to models that come without data."""
    shape = tuple(d.dim_value if d.HasField("dim_value") else 1 for d in info.type.tensor_type.shape.dim)
    count = int(np.prod(shape))
    return (np.arange(count).reshape(shape) / count).astype(np.float32)


def _tensor(path: str) -> np.ndarray:
    import onnx

    proto = onnx.TensorProto()
    proto.ParseFromString(pathlib.Path(path).read_bytes())
    return onnx.numpy_helper.to_array(proto)


def _stored(folder: str, model: Any) -> tuple[list[Any], list[Any]]:
    def values(what: str, infos: Any) -> list[Any]:
        count = len(glob.glob(os.path.join(folder, f"{what}_*.pb")))
        return [_value(os.path.join(folder, f"{what}_{i}.pb"), infos[i].type) for i in range(count)]

    return values("input", model.graph.input), values("output", model.graph.output)


def _value(path: str, type_proto: Any) -> Any:
    import onnx

    if type_proto.HasField("tensor_type"):
        return _tensor(path)
    kind = "sequence" if type_proto.HasField("sequence_type") else "optional"
    proto = onnx.SequenceProto() if kind == "sequence" else onnx.OptionalProto()
    proto.ParseFromString(pathlib.Path(path).read_bytes())
    return onnx.numpy_helper.to_list(proto) if kind == "sequence" else onnx.numpy_helper.to_optional(proto)


def outcome(case: Case, *, eager: bool = False) -> Outcome:
    """Runs one case on every data set that it has. JAX must be in 64-bit mode: the suite compares dtypes."""
    from zenith_jax.frontends.onnx import NotStaticError, UnsupportedError, load

    start = time.perf_counter()
    how = EAGER if eager else JIT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result, reason, trace = PASS, "", ""
        try:
            model = load(case.model)
            options = NEW_EMITTERS if "FNUZ" in case.name else {}
            for inputs, expected in case.data:
                try:
                    results, ran = _run(model, inputs, how, options)
                except NotStaticError:
                    how = EAGER
                    results, ran = _run(model, inputs, how, options)
                how = ran
                try:
                    _compare(expected, results, case)
                except AssertionError as error:
                    result = RANDOM if _is_another_draw(case, inputs, expected, results) else WRONG
                    reason, trace = _one_line(error), traceback.format_exc()
                    break
        except Exception as error:
            result = UNSUPPORTED if isinstance(error, UnsupportedError) else ERROR
            reason, trace = _one_line(error), traceback.format_exc()
    return Outcome(case.name, case.kind, result, how, time.perf_counter() - start, reason, trace)


def _run(model: Any, inputs: list[Any], how: str, compiler_options: dict[str, Any]) -> tuple[list[Any], str]:
    import jax

    given = {info.name: value for info, value in zip(model.inputs, inputs, strict=True)}
    if how == EAGER:
        return _numpy(model.apply(model.params, **given)), EAGER
    statics = {k: v for k, v in given.items() if k in model.static_inputs or not _can_be_traced(v)}
    traced = {k: v for k, v in given.items() if k not in statics}
    if not traced and not (model.params or model.constants):
        return _numpy(model.apply(model.params, **given)), STATIC
    function = lambda params, traced: model.apply(params, **traced, **statics)  # noqa: E731
    compiled = jax.jit(function, compiler_options=compiler_options)
    return _numpy(compiled({**model.params, **model.constants}, traced)), JIT if traced else STATIC


def _can_be_traced(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_can_be_traced(v) for v in value)
    return value is not None and np.asarray(value).dtype.kind not in "OUS"


def _numpy(values: Any) -> list[Any]:
    return [
        _numpy(v) if isinstance(v, list | tuple) else v if v is None or isinstance(v, np.ndarray) else np.asarray(v)
        for v in values
    ]


def _compare(expected: Any, results: Any, case: Case) -> None:
    """Raises AssertionError where they differ by more than the suite's runner permits; it cannot take lists of scalars,
    so that sequences are compared one element after the other."""
    from onnx.backend.test.runner import Runner

    structures = _structure(expected), _structure(results)
    assert structures[0] == structures[1], f"expected {structures[0]}, got {structures[1]}"
    Runner.assert_similar_outputs(
        _arrays(expected), _arrays(results), rtol=case.rtol, atol=case.atol, model_dir=case.name
    )


def _structure(value: Any) -> Any:
    return [_structure(v) for v in value] if isinstance(value, list | tuple) else None if value is None else "array"


def _arrays(value: Any) -> list[np.ndarray]:
    if isinstance(value, list | tuple):
        return [array for v in value for array in _arrays(v)]
    return [] if value is None else [value]


def _is_another_draw(case: Case, inputs: list[Any], expected: list[Any], results: list[Any]) -> bool:
    """Whether the results could be what a generator of random numbers gives that is not NumPy's."""
    if any(e.shape != r.shape or e.dtype != r.dtype for e, r in zip(expected, results, strict=True)):
        return False
    first, last = case.model.graph.node[0], case.model.graph.node[-1]
    if first.op_type == "Dropout":
        x, ratio = inputs[0], float(inputs[1]) if len(inputs) > 1 and first.input[1] else 0.5
        kept = results[1] if len(results) > 1 else results[0] != 0
        return bool(kept.any() and not kept.all() and np.allclose(results[0], np.where(kept, x / (1 - ratio), 0)))
    if "Bernoulli" in (first.op_type, last.op_type) or any(
        n.op_type == "RandomUniformLike" for n in case.model.graph.node
    ):
        return set(np.unique(results[0])) <= {0, 1}
    return False


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def _batch(selected: list[str], eager: bool) -> list[Outcome]:
    import jax

    jax.config.update("jax_enable_x64", True)
    outcomes = []
    for i, name in enumerate(selected):
        outcomes.append(outcome(case(name), eager=eager))
        if i % 200 == 199:
            jax.clear_caches()
    return outcomes


def run(selected: list[str], *, eager: bool = False, jobs: int = 1) -> list[Outcome]:
    """The outcomes of these cases, in processes of their own where jobs > 1."""
    if jobs == 1:
        return _batch(selected, eager)
    parts = [selected[i::jobs] for i in range(jobs)]
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        return [o for part in pool.map(_batch, parts, [eager] * jobs) for o in part]


def table(outcomes: list[Outcome]) -> str:
    """Scores by kind."""
    columns = ("cases", "pass", JIT, EAGER, STATIC, "unsup.", RANDOM, WRONG, ERROR)
    lines = [" " * 18 + "".join(f" {c:>6}" for c in columns)]
    kinds = collections.Counter(o.kind for o in outcomes)
    for kind in [*kinds, "all"]:
        of_kind = [o for o in outcomes if kind in (o.kind, "all")]
        passed = [o for o in of_kind if o.result == PASS]
        counts = [len(of_kind), len(passed), *(sum(o.how == h for o in passed) for h in (JIT, EAGER, STATIC))]
        counts += [sum(o.result == r for o in of_kind) for r in (UNSUPPORTED, RANDOM, WRONG, ERROR)]
        lines.append(f"{kind:18} " + " ".join(f"{c:6}" for c in counts))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expressions, separated by commas, searched in names")
    parser.add_argument("--eager", action="store_true", help="node by node, without jax.jit")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("-v", "--verbose", action="store_true", help="tracebacks")
    arguments = parser.parse_args()
    patterns = [p for p in arguments.only.split(",") if p]
    selected = [n for n in names() if not patterns or any(re.search(p, n) for p in patterns)]
    outcomes = run(selected, eager=arguments.eager, jobs=arguments.jobs)
    for o in outcomes:
        if o.result != PASS:
            print(f"{o.result:11} {o.how:6} {o.name}: {o.reason}")
            if arguments.verbose:
                print(o.trace)
    slow = sorted(outcomes, key=lambda o: -o.seconds)[:5]
    print("slowest: " + ", ".join(f"{o.name} {o.seconds:.1f} s" for o in slow))
    print(table(outcomes))
    return 0 if all(o.result == PASS for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
