"""jaxpr -> jaxpr: finds sites, chooses, and puts ops in their place. Recursive into control flow.

`rewrite(jaxpr, context)` is pure. It returns the same jaxpr where nothing was fused.
"""

from __future__ import annotations

import dataclasses
import functools as ft
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jec

from zenith_jax.errors import Refusal, refuse
from zenith_jax.ir import _compat
from zenith_jax.ir._compat import JaxprEqn, Var
from zenith_jax.ir.emit import emitted
from zenith_jax.ir.graph import Graph
from zenith_jax.passes import gain, layout
from zenith_jax.passes.apart import kept_apart
from zenith_jax.passes.choose import RULES, Choices, declined
from zenith_jax.passes.match import MATCHERS, Match
from zenith_jax.passes.match._match import narrowed
from zenith_jax.passes.whole import Spec, described, gathered, whole_dims
from zenith_jax.report import Site, record
from zenith_jax.telemetry.compiling import clock, clocked

logger = logging.getLogger("zenith_jax")

# Sub-jaxprs are swapped whole, with the same signature, and no other param is read. The derivative rules in a
# custom_jvp_call or custom_vjp_call are the user's and stay; shard_map is rebuilt in its own context.
RECURSED = {
    "cond",
    "scan",
    "while",
    "remat",
    "remat2",
    "checkpoint",
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
}


@dataclasses.dataclass(frozen=True)
class Context:
    """platform: "cpu" or "cuda". differentiated: the jaxpr is a primal that is about to be differentiated.
    registered: patterns that users have registered; they claim equations before ours."""

    platform: str
    use_cost: bool = True
    differentiated: bool = False
    where: str = ""
    registered: tuple[Callable, ...] = ()
    choices: Choices | None = None  # measured times, in place of the rules
    # Of the program's arguments: the mesh axes of each dimension, as far as they are known; for the report.
    shardings: tuple[Spec, ...] = ()

    def inside(self, primitive: str) -> Context:
        return dataclasses.replace(self, where=f"{self.where}/{primitive}".strip("/"), shardings=())


def rewrite(jaxpr: Any, context: Context) -> Any:
    """`jaxpr`, open or closed, with every site that is worth it computed by a Zenith op."""
    if _compat.is_high(jaxpr):
        return jaxpr
    with clock("graph"):
        graph = Graph.of(jaxpr)
    replacements: dict[int, Sequence[JaxprEqn]] = {}
    constvars: list[Var] = []
    consts: list[Any] = []
    planned = plan(graph, context)
    taken = {id(e) for match in planned for e in match.inner}
    arranged = () if context.differentiated else layout.matches(graph, context.platform, taken)
    for match in (*planned, *arranged):
        with clock("emit"):
            eqns, new_constvars, new_consts = emitted(
                _trace_of(match), match.leaves, match.results, match.root.source_info
            )
        index = graph.producers[match.root.outvars[0]]
        replacements[index] = [*replacements.get(index, ()), *eqns]
        constvars += new_constvars
        consts += new_consts
    if constvars and not isinstance(jaxpr, _compat.ClosedJaxpr):
        raise AssertionError(f"an op's trace holds constants, which an open jaxpr cannot: {constvars}")
    if context.platform == "cuda" and context.use_cost:
        replacements.update(kept_apart(graph, planned))
    for index, eqn in enumerate(graph.eqns):
        if index not in replacements:
            new = _recursed(eqn, context)
            if new is not None:
                replacements[index] = new
    with clock("rebuild"):
        return graph.rewritten(replacements, constvars, consts) if replacements else jaxpr


# --- what to fuse -----------------------------------------------------------------------------------------------------


def plan(graph: Graph, context: Context) -> list[Match]:
    """Matches to carry out: each equation claimed by one, registered patterns first, then in the order of MATCHERS."""
    claimed: set[int] = set()
    plan: list[Match] = []
    sites: list[tuple[int, Site]] = []
    for matcher in clocked((*context.registered, *MATCHERS), lambda m: f"match.{_op_of(m)}"):
        for index, eqn in enumerate(graph.eqns):
            if id(eqn) in claimed:
                continue
            found = _attempt(matcher, graph, eqn)
            if found is None:
                continue
            while isinstance(found, Match) and any(id(e) in claimed for e in found.inner if e is not eqn):
                found = found.simpler
            if found is None:
                continue  # another match has equations of this one, and computes them
            op = found.op if isinstance(found, Match) else _op_of(matcher)
            refusal = (
                found
                if isinstance(found, Refusal)
                else declined(found, context.platform, differentiated=context.differentiated, use_cost=context.use_cost)
            )
            if isinstance(found, Match) and refusal is not None and found.simpler is not None:
                found, op, refusal = _simpler(found, refusal, claimed, context)
            if refusal is not None and isinstance(found, Match) and found.unmentioned:
                continue
            saved = gain.bytes_saved(found) if isinstance(found, Match) else 0
            site = Site(
                op=op,
                fused=False,
                source=_compat.source_line(eqn),
                detail=found.detail if isinstance(found, Match) else "",
                shapes=_shapes(found) if isinstance(found, Match) else "",
                flops=gain.flops(found) if isinstance(found, Match) else 0,
                bytes_saved=saved,
                expected_us=gain.expected_us(saved, context.platform),
                where=context.where,
                differentiated=context.differentiated,
            )
            if isinstance(found, Match) and refusal is None and context.choices is not None:
                refusal = context.choices.declined(site.key)
                form = None if refusal is None else _form(found, context)
                if form is not None and not any(id(e) in claimed for e in form.inner):
                    site = dataclasses.replace(site, op=form.op, detail=f"{form.detail}; no {site.op}: {refusal}")
                    found, refusal = form, None
            if isinstance(found, Match) and refusal is None:
                refusal = _untraceable(found)
            sites.append((index, _decided(site, refusal, found, graph, context)))
            yields = refusal is not None and isinstance(found, Match) and (found.yields or found.declined is not None)
            if isinstance(found, Match) and not yields:
                claimed.update(id(e) for e in found.inner)
                if refusal is None:
                    plan.append(found)
    for _, site in sorted(sites, key=lambda item: item[0]):
        record(site)
    # A value before its cast may be what another match starts from, below the cast.
    leaves = {a for m in plan for a in m.leaves if isinstance(a, Var)}
    return [m if m.results[0] in leaves else narrowed(graph, m) for m in plan]


def _form(match: Match, context: Context) -> Match | None:
    """XLA's operations in the form that its compiler likes best, where the kernel was measured to be slower."""
    form = match.simpler
    while form is not None and not form.is_form:
        form = form.simpler
    if form is None or declined(form, context.platform, differentiated=context.differentiated, use_cost=True):
        return None
    return form


def _simpler(match: Match, refusal: Refusal, claimed: set[int], context: Context) -> tuple[Match, str, Refusal | None]:
    """What to do instead of a match that is refused: the first of the simpler ones that is not, with the reason in its
    detail."""
    simpler = match.simpler
    while simpler is not None and (
        any(id(e) in claimed for e in simpler.inner)
        or declined(simpler, context.platform, differentiated=context.differentiated, use_cost=context.use_cost)
    ):
        simpler = simpler.simpler
    if simpler is None:
        return match, match.op, refusal
    return dataclasses.replace(simpler, detail=f"{simpler.detail}; no {match.op}: {refusal}"), simpler.op, None


def _decided(site: Site, refusal: Refusal | None, found: Match | Refusal, graph: Graph, context: Context) -> Site:
    """The site with what became of it."""
    if refusal is not None:
        reason = str(dataclasses.replace(refusal, advice=""))
        return dataclasses.replace(site, reason=reason, advice=refusal.advice)
    assert isinstance(found, Match)
    dims = found.whole
    if dims is None:
        dims = whole_dims(_trace_of(found))
    known = dict(zip(graph.invars, context.shardings, strict=False))
    site = dataclasses.replace(site, whole=described(found, dims), gathered=gathered(graph, found, dims, known))
    return dataclasses.replace(site, fused=True, choice=_choice(found, context), measure=gain.timed(graph, found))


def _shapes(match: Match) -> str:
    avals = [a.aval for a in match.leaves if hasattr(a.aval, "shape")]
    return ", ".join(f"{a.dtype.name}[{','.join(map(str, a.shape))}]" for a in avals)


def _choice(match: Match, context: Context) -> str:
    if match.declined is not None:
        return "the registered replacement, which supports these arguments"
    if match.is_form:
        return "XLA's operations, in the form that it compiles best"
    if context.choices is not None:
        return f"Zenith's {context.platform} kernel, measured on this device"
    rule = "by the measured rule of this platform" if context.use_cost else "by request: the cost rule is switched off"
    known = match.op in RULES.get(context.platform, ())
    return f"Zenith's {context.platform} kernel, " + (rule if known else "always: no rule is against it")


def _op_of(matcher: Any) -> str:
    return getattr(matcher, "name", None) or matcher.__module__.rsplit(".", 1)[-1]


def _attempt(matcher: Callable, graph: Graph, eqn: JaxprEqn) -> Match | Refusal | None:
    """A matcher's verdict; a bug in it loses one fusion and not the user's program."""
    try:
        return matcher(graph, eqn)
    except Exception:
        logger.exception("matcher %s failed at %s; please report it", _op_of(matcher), _compat.source_line(eqn))
        return None


# --- how -------------------------------------------------------------------------------------------------------------


def _untraceable(match: Match) -> Refusal | None:
    """Why the match's op cannot be written for these operands, or None: explicit mesh axes may split a dimension that
    it reshapes. That loses this site, not the user's program."""
    try:
        _trace_of(match)
    except Exception as error:
        if not any(_compat.explicit_sharding(a.aval) for a in match.leaves):
            logger.exception("the op %s failed; please report it", match.op)
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return refuse("the op cannot be written for these operands: {error}", error=first)
    return None


def _trace_of(match: Match) -> Any:
    """The jaxpr of the match's op, its results sharded as the program's where mesh axes are explicit."""
    shardings = tuple(_compat.explicit_sharding(v.aval) for v in match.results)
    return _traced(match.emit, match.static, tuple(a.aval for a in match.leaves), shardings)


@ft.lru_cache(maxsize=4096)
def _traced(emit: Callable, static: tuple, avals: tuple, shardings: tuple) -> Any:
    # Traced with the names of nothing: all sites of one shape share this jaxpr, and rename its variables.
    def function(*leaves: Any) -> list[Any]:
        return [_compat.resharded(x, s) for x, s in zip(emit(*leaves, **dict(static)), shardings, strict=True)]

    return jax.make_jaxpr(function)(*(_compat.struct(a) for a in avals))


def _recursed(eqn: JaxprEqn, context: Context) -> Sequence[JaxprEqn] | None:
    """The equation with rewritten sub-jaxprs; None where nothing changed."""
    name: Any = eqn.primitive.name
    if name == "shard_map":
        return _shard_mapped(eqn, context)
    if name not in RECURSED:
        return None
    if context.differentiated and name.startswith("custom_"):
        # Its primal is not what will run, the rule is. Where nothing is differentiated after all, the call stays in
        # the outer program, and is rewritten with that.
        return None
    inner = context.inside("remat" if name in ("remat2", "checkpoint") else name)
    changed = False

    def visit(jaxpr: Any) -> Any:
        nonlocal changed
        new = rewrite(jaxpr, inner)
        changed = changed or new is not jaxpr
        return new

    params = _compat.map_subjaxprs(eqn.params, visit)
    return [eqn.replace(params=params)] if changed else None


def _shard_mapped(eqn: JaxprEqn, context: Context) -> Sequence[JaxprEqn] | None:
    """shard_map again, by its public API: its body must be rewritten and traced where its mesh axes are manual."""
    params = eqn.params
    body = _compat.closed(params["jaxpr"])
    inner = context.inside("shard_map")
    changed = False

    def run(*args: Any) -> Any:
        nonlocal changed
        new = rewrite(body, inner)
        changed = changed or new is not body
        return jec.jaxpr_as_fun(new)(*args)

    mapped = jax.shard_map(
        run,
        mesh=params["mesh"],
        in_specs=tuple(params["in_specs"]),
        out_specs=list(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=set(params["newly_manual_axes"]),
    )
    jaxpr = jax.make_jaxpr(mapped)(*(_compat.struct(a.aval) for a in eqn.invars))
    opened = _compat.opened(jaxpr)
    if not changed or opened.constvars or len(opened.eqns) != 1:
        return None
    return [opened.eqns[0].replace(invars=eqn.invars, outvars=eqn.outvars, source_info=eqn.source_info)]
