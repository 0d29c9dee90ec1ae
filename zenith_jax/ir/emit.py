"""The equations of a traced function, written into another program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zenith_jax.ir import _compat
from zenith_jax.ir._compat import DropVar, JaxprEqn, Literal, Var


def emitted(
    jaxpr: Any, operands: Sequence[Any], results: Sequence[Var], source: Any
) -> tuple[list[JaxprEqn], list[Var], list[Any]]:
    """Equations that compute `results` from `operands` as the jaxpr does, with its constants as variables and values.

    source: the source_info of the code that they stand for, which their own name stacks continue.
    """
    opened = _compat.opened(jaxpr)
    env: dict[Any, Any] = dict(zip(opened.invars, operands, strict=True))
    constvars = [_compat.new_var(v.aval) for v in opened.constvars]
    env.update(zip(opened.constvars, constvars, strict=True))
    if any(isinstance(v, Literal) or v in env for v in opened.outvars) or len(set(opened.outvars)) < len(results):
        raise AssertionError(f"a traced function returns an operand, or one value twice: {opened}")
    # Results keep the variables that they have in the program.
    targets: dict[Any, Var] = dict(zip(opened.outvars, results, strict=True))
    eqns = []
    for eqn in opened.eqns:
        invars = [a if isinstance(a, Literal) else env[a] for a in eqn.invars]
        outvars = [v if isinstance(v, DropVar) else targets.get(v) or _compat.new_var(v.aval) for v in eqn.outvars]
        env.update(zip(eqn.outvars, outvars, strict=True))
        info = source.replace(name_stack=source.name_stack + eqn.source_info.name_stack)
        eqns.append(eqn.replace(invars=invars, outvars=outvars, source_info=info))
    return eqns, constvars, list(_compat.constants(jaxpr))
