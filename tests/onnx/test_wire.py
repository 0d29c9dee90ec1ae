"""The weights that `wire` takes out of a file are those that protobuf would have read, and the rest is untouched."""

import numpy as np
import pytest

from zenith_jax.frontends.onnx import wire

onnx = pytest.importorskip("onnx")


def model(*arrays):
    names = [f"w{i}" for i in range(len(arrays))]
    tensors = [onnx.numpy_helper.from_array(a, n) for a, n in zip(arrays, names, strict=True)]
    node = onnx.helper.make_node("Sum", names, ["y"])
    graph = onnx.helper.make_graph([node], "g", [], [onnx.helper.make_empty_tensor_value_info("y")], tensors)
    return onnx.helper.make_model(graph)


def taken_apart(proto):
    small, raw = wire.without_weights(np.frombuffer(proto.SerializeToString(), np.uint8))
    rest = onnx.ModelProto()
    rest.ParseFromString(small)
    return rest, raw


def test_large_weights_are_views_and_the_rest_is_the_same_model():
    rng = np.random.default_rng(0)
    big, small = rng.normal(size=(40, 30)).astype(np.float32), rng.normal(size=3).astype(np.float32)
    original = model(big, small, big[::-1].copy())
    rest, raw = taken_apart(original)
    assert sorted(raw) == [0, 2]
    assert all(r.base is not None for r in raw.values())
    np.testing.assert_array_equal(raw[0].view(np.float32).reshape(big.shape), big)
    np.testing.assert_array_equal(raw[2].view(np.float32).reshape(big.shape), big[::-1])
    for position in raw:
        assert not rest.graph.initializer[position].HasField("raw_data")
        rest.graph.initializer[position].raw_data = raw[position].tobytes()
    assert rest == original


@pytest.mark.parametrize("cut", [1, 10, 500, 3000, 4000])
def test_what_protobuf_refuses_is_passed_on_as_it_is(cut):
    content = np.frombuffer(model(np.ones((32, 32), np.float32)).SerializeToString()[:-cut], np.uint8)
    small, raw = wire.without_weights(content)
    assert (small, raw) == (content.tobytes(), {})


def test_a_graph_given_twice_is_left_to_protobuf_which_merges_them():
    content = model(np.ones((32, 32), np.float32)).SerializeToString() * 2
    assert wire.without_weights(np.frombuffer(content, np.uint8)) == (content, {})


def test_lengths_beyond_the_file_are_not_followed():
    content = np.frombuffer(b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f" + b"x" * 50, np.uint8)
    assert wire.without_weights(content) == (content.tobytes(), {})
