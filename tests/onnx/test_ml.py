"""Operators of ai.onnx.ml against ONNX Runtime."""

import numpy as np
import pytest
from onnx_one_node import model, runtime, zenith

pytest.importorskip("onnxruntime")
ML = "ai.onnx.ml"
RNG = np.random.default_rng(0)
X = RNG.standard_normal((7, 4)).astype(np.float32)

# Two trees: features 0, 1 and 2; the second is deeper on one side.
TREES = {
    "nodes_treeids": [0, 0, 0, 1, 1, 1, 1, 1],
    "nodes_nodeids": [0, 1, 2, 0, 1, 2, 3, 4],
    "nodes_featureids": [0, 0, 0, 1, 0, 2, 0, 0],
    "nodes_values": [0.1, 0.0, 0.0, -0.3, 0.0, 0.2, 0.0, 0.0],
    "nodes_modes": ["BRANCH_LEQ", "LEAF", "LEAF", "BRANCH_GT", "LEAF", "BRANCH_LT", "LEAF", "LEAF"],
    "nodes_truenodeids": [1, 0, 0, 1, 0, 3, 0, 0],
    "nodes_falsenodeids": [2, 0, 0, 2, 0, 4, 0, 0],
    "nodes_missing_value_tracks_true": [1, 0, 0, 0, 0, 1, 0, 0],
}
LEAF_TREES, LEAF_NODES = [0, 0, 1, 1, 1], [1, 2, 1, 3, 4]
SIGNED, POSITIVE = [0.7, -0.4, 0.5, -1.2, 0.1], [0.1, 0.4, 0.05, 0.5, 0.3]
WITH_NAN = np.where(RNG.random(X.shape) < 0.2, np.nan, X).astype(np.float32)


def regressor(**more):
    leaves = {"target_treeids": LEAF_TREES, "target_nodeids": LEAF_NODES, "target_weights": SIGNED}
    return {**TREES, **leaves, "target_ids": [0, 1, 0, 1, 1], "n_targets": 2, **more}


def classifier(ids, weights, **more):
    leaves = {"class_treeids": LEAF_TREES, "class_nodeids": LEAF_NODES, "class_weights": weights, "class_ids": ids}
    return {**TREES, **leaves, **more}


LINEAR = RNG.standard_normal(12).astype(np.float32).tolist()
ZERO, ONE, THREE = [0] * 5, [1] * 5, [0, 1, 2, 0, 1]
CASES = {
    "trees_sum": ("TreeEnsembleRegressor", X, regressor(base_values=[0.5], target_ids=[0] * 5, n_targets=1), 1),
    "trees_missing": ("TreeEnsembleRegressor", WITH_NAN, regressor(), 1),
    "trees_min": ("TreeEnsembleRegressor", X, regressor(aggregate_function="MIN", target_ids=[0] * 5, n_targets=1), 1),
    "trees_average": ("TreeEnsembleRegressor", X, regressor(aggregate_function="AVERAGE"), 1),
    "trees_of_three_classes": (
        "TreeEnsembleClassifier",
        X,
        classifier(THREE, POSITIVE, classlabels_int64s=[5, 7, 9], post_transform="SOFTMAX"),
        2,
    ),
    "trees_binary_signed": (
        "TreeEnsembleClassifier",
        X,
        classifier(ZERO, SIGNED, classlabels_int64s=[0, 1], post_transform="LOGISTIC"),
        2,
    ),
    "trees_binary_probability": (
        "TreeEnsembleClassifier",
        X,
        classifier(ZERO, POSITIVE, classlabels_int64s=[3, 4]),
        2,
    ),
    "trees_binary_by_the_second_class": (
        "TreeEnsembleClassifier",
        X,
        classifier(ONE, SIGNED, classlabels_int64s=[0, 1], post_transform="LOGISTIC"),
        2,
    ),
    "linear_regressor": (
        "LinearRegressor",
        X,
        {"coefficients": LINEAR, "intercepts": [1.0, 0.0, -1.0], "targets": 3},
        1,
    ),
    "linear_classifier": (
        "LinearClassifier",
        X,
        {
            "coefficients": LINEAR,
            "intercepts": [0.1, 0.2, 0.3],
            "classlabels_ints": [4, 5, 6],
            "post_transform": "SOFTMAX",
        },
        2,
    ),
    "linear_binary": (
        "LinearClassifier",
        X,
        {
            "coefficients": LINEAR[:8],
            "intercepts": [0.1, -0.1],
            "classlabels_ints": [0, 1],
            "post_transform": "LOGISTIC",
        },
        2,
    ),
    "scaler": ("Scaler", X, {"offset": [1.0, 2.0, 3.0, 4.0], "scale": [0.5, 1.0, 2.0, -1.0]}, 1),
    "normalizer_max": ("Normalizer", np.abs(X), {"norm": "MAX"}, 1),
    "normalizer_l1": ("Normalizer", X, {"norm": "L1"}, 1),
    "normalizer_l2": ("Normalizer", X, {"norm": "L2"}, 1),
    "imputer": ("Imputer", WITH_NAN, {"imputed_value_floats": [1.0, 2.0, 3.0, 4.0], "replaced_value_float": np.nan}, 1),
    "one_hot": ("OneHotEncoder", np.array([3, 1, 9]), {"cats_int64s": [1, 2, 3]}, 1),
    "labels": (
        "LabelEncoder",
        np.array([3, 1, 9]),
        {"keys_int64s": [9, 1], "values_floats": [0.5, 0.25], "default_float": -1.0},
        1,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_onnx_runtime(name):
    op_type, x, attributes, outputs = CASES[name]
    proto = model(op_type, [x], attributes, outputs=outputs, domain=ML, opset=17)
    proto.opset_import[1].version = 3
    for got, wanted in zip(zenith(proto, [x]), runtime(proto, [x]), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
