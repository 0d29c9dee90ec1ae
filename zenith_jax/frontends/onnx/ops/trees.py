"""ai.onnx.ml's tree ensembles: all trees descend together, one level a step, by look-up in tables of the nodes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from zenith_jax.frontends.onnx import dtypes
from zenith_jax.frontends.onnx.ops.ml import label_of, ml_operator, post_transformed
from zenith_jax.frontends.onnx.values import OnnxError, UnsupportedError

_MODES = ("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ", "BRANCH_MEMBER")
_LEAF = len(_MODES)
_TRANSFORMS = ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT")
_AGGREGATES = ("AVERAGE", "SUM", "MIN", "MAX")


@dataclasses.dataclass(frozen=True)
class _Forest:
    """A row for each node; a leaf is its own successor. members: (nodes, most) for BRANCH_MEMBER, NaN-filled.

    leaves: (nodes, targets), what a leaf adds; NaN where a leaf says nothing of a target.
    """

    roots: np.ndarray
    feature: np.ndarray
    split: np.ndarray
    mode: np.ndarray
    on_true: np.ndarray
    on_false: np.ndarray
    missing_is_true: np.ndarray
    leaves: np.ndarray
    members: np.ndarray | None = None

    def depth(self) -> int:
        """Steps from the roots to the deepest leaf. Raises for a cycle."""
        level, depth = np.unique(self.roots), 0
        while (inner := level[self.mode[level] != _LEAF]).size:
            level = np.unique(np.concatenate([self.on_true[inner], self.on_false[inner]]))
            depth += 1
            if depth > len(self.mode):
                raise OnnxError("the nodes of a tree form a cycle")
        return depth


def _reached(forest: _Forest, x: Any) -> Any:
    """The leaf that each row of x reaches in each tree: (rows, trees)."""
    rows = jnp.arange(x.shape[0])[:, None]
    at = jnp.broadcast_to(jnp.asarray(forest.roots), (x.shape[0], len(forest.roots)))
    modes = sorted(set(forest.mode.tolist()) - {_LEAF})
    for _ in range(forest.depth()):
        value = x[rows, jnp.asarray(forest.feature)[at]]
        split = jnp.asarray(forest.split)[at]
        tests = [
            lambda v, s: v <= s,
            lambda v, s: v < s,
            lambda v, s: v >= s,
            lambda v, s: v > s,
            lambda v, s: v == s,
            lambda v, s: v != s,
            lambda v, s: (v[..., None] == jnp.asarray(forest.members)[at]).any(-1),  # noqa: B023 -- called here
        ]
        mode = jnp.asarray(forest.mode)[at]
        holds: Any = jnp.zeros(at.shape, bool)
        for kind in modes:
            holds = jnp.where(mode == kind, tests[kind](value, split), holds)
        if forest.missing_is_true.any():
            holds = holds | (jnp.isnan(value) & jnp.asarray(forest.missing_is_true)[at])
        at = jnp.where(holds, jnp.asarray(forest.on_true)[at], jnp.asarray(forest.on_false)[at])
    return at


def _aggregated(forest: _Forest, x: Any, how: str, base: Any) -> Any:
    x = jnp.asarray(x if dtypes.is_floating(x) else x.astype(np.float32))
    x = x.reshape(1, -1) if x.ndim == 1 else x
    scores = jnp.asarray(forest.leaves)[_reached(forest, x)]  # rows, trees, targets
    said = ~jnp.isnan(scores)
    match how:
        case "SUM" | "AVERAGE":
            total = jnp.where(said, scores, 0).sum(1)
            total = total / len(forest.roots) if how == "AVERAGE" else total
        case "MIN" | "MAX":
            none = jnp.inf if how == "MIN" else -jnp.inf
            scores = jnp.where(said, scores, none)
            total = jnp.where(said.any(1), scores.min(1) if how == "MIN" else scores.max(1), 0)
        case _:
            raise UnsupportedError(f"trees have no aggregate function {how!r}; they are {', '.join(_AGGREGATES)}")
    return total if base is None else total + np.asarray(base, total.dtype)


@ml_operator("TreeEnsemble", since=5)
def tree_ensemble(
    x,
    *,
    tree_roots,
    nodes_featureids,
    nodes_splits,
    nodes_modes,
    nodes_truenodeids,
    nodes_falsenodeids,
    nodes_trueleafs,
    nodes_falseleafs,
    leaf_targetids,
    leaf_weights,
    n_targets,
    nodes_hitrates=None,
    nodes_missing_value_tracks_true=None,
    membership_values=None,
    aggregate_function=1,
    post_transform=0,
):
    nodes, leaves = len(nodes_featureids), len(leaf_targetids)
    mode = np.concatenate([np.asarray(nodes_modes, np.int64), np.full(leaves, _LEAF)])
    own = np.arange(nodes + leaves)

    def successors(ids: Any, leafs: Any) -> np.ndarray:
        return np.concatenate([np.asarray(ids, np.int64) + nodes * np.asarray(leafs, np.int64), own[nodes:]])

    def over_leaves(values: Any, dtype: Any) -> np.ndarray:
        return np.concatenate([np.asarray(values, dtype), np.zeros(leaves, dtype)])

    weights = np.full((nodes + leaves, n_targets), np.nan, leaf_weights.dtype)
    weights[own[nodes:], np.asarray(leaf_targetids)] = leaf_weights
    missing = [0] * nodes if nodes_missing_value_tracks_true is None else nodes_missing_value_tracks_true
    forest = _Forest(
        np.asarray(tree_roots, np.int64),
        over_leaves(nodes_featureids, np.int64),
        over_leaves(nodes_splits, nodes_splits.dtype),
        mode,
        successors(nodes_truenodeids, nodes_trueleafs),
        successors(nodes_falsenodeids, nodes_falseleafs),
        over_leaves(missing, bool),
        weights,
        _members(mode, membership_values),
    )
    scores = _aggregated(forest, x, _AGGREGATES[aggregate_function], None).astype(x.dtype)
    return post_transformed(scores, _TRANSFORMS[post_transform])


def _members(mode: np.ndarray, values: Any) -> np.ndarray | None:
    """The sets, each ended by NaN in `values`, in the order of the nodes that test for them."""
    testing = np.flatnonzero(mode == _MODES.index("BRANCH_MEMBER"))
    if not testing.size:
        return None
    values = np.asarray([] if values is None else values)
    ends = np.flatnonzero(np.isnan(values))
    sets = np.split(values, ends + 1)[: len(ends)]
    if len(sets) != len(testing):
        raise OnnxError(f"membership_values holds {len(sets)} sets for {len(testing)} nodes")
    table = np.full((len(mode), max(len(s) for s in sets)), np.nan, values.dtype)
    for node, members in zip(testing, sets, strict=True):
        table[node, : len(members) - 1] = members[:-1]
    return table


@ml_operator("TreeEnsembleRegressor")
def tree_ensemble_regressor(
    x,
    *,
    n_targets=1,
    target_treeids,
    target_nodeids,
    target_ids,
    target_weights=None,
    target_weights_as_tensor=None,
    base_values=None,
    base_values_as_tensor=None,
    aggregate_function="SUM",
    post_transform="NONE",
    **nodes,
):
    weights = target_weights if target_weights_as_tensor is None else target_weights_as_tensor
    forest = _from_lists(nodes, target_treeids, target_nodeids, target_ids, weights, n_targets)
    base = base_values if base_values_as_tensor is None else base_values_as_tensor
    return post_transformed(_aggregated(forest, x, aggregate_function, base), post_transform)


@ml_operator("TreeEnsembleClassifier")
def tree_ensemble_classifier(
    x,
    *,
    class_treeids,
    class_nodeids,
    class_ids,
    class_weights=None,
    class_weights_as_tensor=None,
    classlabels_int64s=None,
    classlabels_strings=None,
    base_values=None,
    base_values_as_tensor=None,
    post_transform="NONE",
    **nodes,
):
    """Labels and scores. Two classes may be told by the score of one: see `_binary`."""
    labels = classlabels_strings or classlabels_int64s or ()
    weights = np.asarray(class_weights if class_weights_as_tensor is None else class_weights_as_tensor)
    base = base_values if base_values_as_tensor is None else base_values_as_tensor
    binary = len(labels) == 2 and len(set(class_ids)) == 1
    ids = [0] * len(class_ids) if binary else class_ids
    forest = _from_lists(nodes, class_treeids, class_nodeids, ids, weights, 1 if binary else len(labels))
    if binary:
        base = None if base is None or not len(base) else np.asarray(base)[-1:]
        score = _aggregated(forest, x, "SUM", base)
        return _binary(score, labels, bool((weights >= 0).all()), post_transform, both=class_ids[0] == 0)
    scores = _aggregated(forest, x, "SUM", base)
    return label_of(jnp.argmax(scores, 1), labels), post_transformed(scores, post_transform)


def _binary(score: Any, labels: Any, is_probability: bool, post_transform: str, *, both: bool) -> tuple[Any, Any]:
    """From one class's score s, as ONNX Runtime does: weights that are all positive add up to a probability.

    both: the leaves name class 0 and mean class 1, from which the other's score follows; else it is 0.
    """
    best = label_of((score[:, 0] > (0.5 if is_probability else 0)).astype(np.int32), labels)
    if not both:
        scores = jnp.concatenate([jnp.zeros_like(score), score], 1)
    elif is_probability:
        scores, post_transform = jnp.concatenate([1 - score, score], 1), "NONE"
    else:
        scores = jnp.concatenate([-score, score], 1)
        post_transform = post_transform if post_transform == "LOGISTIC" else "NONE"
    return best, post_transformed(scores, post_transform)


def _from_lists(nodes: dict[str, Any], tree_ids: Any, node_ids: Any, targets: Any, weights: Any, count: int) -> _Forest:
    """A forest from the attributes of version 1 to 3, which name a node by its tree's and its own number."""
    known = {"values", "values_as_tensor", "hitrates", "hitrates_as_tensor", "missing_value_tracks_true"}
    known |= {"treeids", "nodeids", "featureids", "modes", "truenodeids", "falsenodeids"}
    if unknown := {n for n in nodes if n.removeprefix("nodes_") not in known}:
        raise UnsupportedError(f"attributes {sorted(unknown)} are not known to tree ensembles")
    keys = list(zip(nodes["nodes_treeids"], nodes["nodes_nodeids"], strict=True))
    place = {key: i for i, key in enumerate(keys)}
    mode = np.array([_LEAF if m == "LEAF" else _MODES.index(m) for m in nodes["nodes_modes"]], np.int64)

    def successors(name: str) -> np.ndarray:
        ids = nodes[name]
        try:
            return np.array([i if mode[i] == _LEAF else place[key[0], ids[i]] for i, key in enumerate(keys)], np.int64)
        except KeyError as error:
            raise OnnxError(f"{name} names the node {error}, which no tree has") from None

    values = nodes.get("nodes_values_as_tensor")
    split = np.asarray(nodes["nodes_values"], np.float32) if values is None else np.asarray(values)
    leaves = np.full((len(keys), count), np.nan, split.dtype)
    for tree, node, target, weight in zip(tree_ids, node_ids, targets, weights, strict=True):
        here = leaves[place[tree, node]]
        here[target] = weight if np.isnan(here[target]) else here[target] + weight
    on_true, on_false = successors("nodes_truenodeids"), successors("nodes_falsenodeids")
    inner = mode != _LEAF
    reached = set(on_true[inner].tolist()) | set(on_false[inner].tolist())
    roots = [i for i in range(len(keys)) if i not in reached]
    missing = nodes.get("nodes_missing_value_tracks_true") or [0] * len(keys)
    return _Forest(
        np.array(roots, np.int64),
        np.asarray(nodes["nodes_featureids"], np.int64),
        split,
        mode,
        on_true,
        on_false,
        np.asarray(missing, bool),
        leaves,
    )
