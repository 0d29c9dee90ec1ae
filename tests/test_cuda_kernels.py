"""The CUDA kernels against their naive oracles: runs the programs that tests/cuda/CMakeLists.txt builds.

They lie in $ZENITH_CUDA_TESTS_DIR, or where an in-place build of this checkout puts them.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess

import pytest

pytestmark = pytest.mark.gpu

IN_PLACE = pathlib.Path(__file__).resolve().parents[1] / "build" / "cuda-tests"
DIRECTORY = pathlib.Path(os.environ.get("ZENITH_CUDA_TESTS_DIR") or IN_PLACE)
PROGRAMS = (
    "attention_test",
    "rows_test",
    "group_norm_test",
    "activation_test",
    "linear_test",
    "quantized_linear_test",
    "rope_test",
    "paged_attention_test",
)


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> str:
    path = DIRECTORY / request.param
    if not path.exists():
        pytest.skip(
            f"{path} is not there; `dev/build.sh PYTHON -DZENITH_CUDA=ON -DZENITH_CUDA_TESTS=ON` builds it, "
            "ZENITH_CUDA_TESTS_DIR says where else it is"
        )
    return str(path)


def run(*command: str) -> str:
    """The output; fails the test with it if the exit status is not 0."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}"
    return done.stdout


def test_kernels_agree_with_their_naive_oracles(program):
    output = run(program)
    print(output)  # pytest -rP shows how near to its tolerance each family is
    assert "all right" in output


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_kernels_pass_compute_sanitizer(program, tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer, of the CUDA toolkit, is not on PATH")
    assert "all right" in run(sanitizer, "--tool", tool, "--error-exitcode", "3", program, "--small")
