"""The small model's parameters and input; fused at its sizes too."""

from collections.abc import Iterator
from typing import Any

import pytest
import small_model

import zenith_jax as zenith


@pytest.fixture(autouse=True)
def without_cost() -> Iterator[None]:
    with zenith.configured(use_cost=False):
        yield


@pytest.fixture
def params() -> Any:
    return small_model.random_params()


@pytest.fixture
def x() -> Any:
    return small_model.random_input()
