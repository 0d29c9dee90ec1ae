"""register: bring your own kernel. One page on it: docs/register.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from zenith_jax.errors import Refusal, RegistrationError
from zenith_jax.ops._op import Spec
from zenith_jax.passes.registered import Registration, activate


def register(
    reference: Callable[..., Any],
    replacement: Callable[..., Any],
    arguments: str | Sequence[Any],
    *,
    name: str | None = None,
    attributes: Mapping[str, float | int] | None = None,
    dtypes: Sequence[Any] | None = None,
    platforms: Sequence[str] | None = None,
    supports: Callable[..., Refusal | str | None] | None = None,
    derivative: str = "auto",
    vmap: str = "replacement",
) -> Registration:
    """Wherever a model computes what `reference` does, `zenith.jit` and `zenith.fuse` call `replacement` instead.

    reference: (*arrays, **attributes) -> an array or a tuple of them, in plain jnp; it is the pattern, the oracle of
        `zenith.verify`, and the source of derivatives.
    replacement: the same signature, shapes and dtypes: a Pallas kernel, an FFI call, anything JAX can call.
    arguments: the reference's arguments as a signature, "*b d, d": `*b` is any number of leading dimensions, a letter
        one dimension, the same size wherever it stands, a number a fixed size. Or example arrays, for fixed ranks.
    attributes: keyword arguments of both functions that are read off the program's literals, with a typical value:
        {"eps": 1e-6}. The reference must use them as they are.
    dtypes: of the arguments, float32 where not given; floats match any float dtype that the program has.
    platforms: ("cpu",), ("cuda",); None is all. supports: (*shapes with dtypes, **attributes) -> why not, or None.
    derivative: "own" where the replacement brings its rule, "reference" for the derivative of the reference; "auto"
        takes the rule of a replacement that is a `jax.custom_vjp` or `jax.custom_jvp`, else the reference's.
    vmap: outside of the decorated function, "replacement" leaves it to the replacement, "batch" calls it with one more
        leading dimension in `*b`, "reference" computes the reference.

    It holds for functions traced from now on; a function that is compiled already does not change. Returns the
    Registration: `.unregister()` it, or use it as a context manager. Raises RegistrationError where the reference
    cannot be compared, for instance where it holds a scan.

    >>> import jax, zenith_jax as zenith
    >>> def halved(x): return jax.numpy.sin(x) / 2
    >>> with zenith.register(halved, lambda x: 0.5 * jax.numpy.sin(x), "*b"):
    ...     print(zenith.explain(lambda x: halved(x) + 1)(jax.numpy.ones((2, 3))).counts())
    {'halved': 1}
    """
    name = str(name or getattr(reference, "__name__", "registered"))
    specs, examples = _arguments(name, arguments)
    count = len(examples) if specs is None else len(specs)
    if dtypes is not None and len(dtypes) != count:
        raise RegistrationError(f"{name}: {count} arguments, but {len(dtypes)} dtypes")
    has_own = isinstance(replacement, (jax.custom_vjp, jax.custom_jvp))
    return activate(
        Registration(
            reference,
            replacement,
            name,
            specs,
            examples,
            tuple(dtypes or ["float32"] * count),
            dict(attributes or {}),
            None if platforms is None else tuple(platforms),
            supports,
            ("own" if has_own else "reference") if derivative == "auto" else derivative,
            vmap,
        )
    )


def _arguments(name: str, arguments: str | Sequence[Any]) -> tuple[tuple[Spec, ...] | None, tuple[Any, ...]]:
    if isinstance(arguments, str):
        specs = tuple(Spec.parse(part) for part in arguments.split(","))
        wrong = [a for s in specs for a in s.axes if not (a.isdigit() or (len(a) == 1 and a.isalpha()))]
        if wrong or any(s.optional for s in specs):
            raise RegistrationError(
                f'{name}: arguments must look like "*b t d, d": letters, numbers and a leading *b; got {arguments!r}'
            )
        return specs, ()
    arrays = [x if hasattr(x, "shape") and hasattr(x, "dtype") else np.asarray(x) for x in arguments]
    if any(x.dtype == object for x in arrays):
        raise RegistrationError(f"{name}: arguments are a signature or example arrays, got {arguments!r}")
    return None, tuple(jax.ShapeDtypeStruct(x.shape, jax.numpy.result_type(x)) for x in arrays)
