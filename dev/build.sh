#!/usr/bin/env bash
# Builds the native modules into this checkout's zenith_jax/, without pip: seconds after the first time.
#
#   dev/build.sh [PYTHON] [-DOPTION=VALUE ...]        e.g.  dev/build.sh .venv/bin/python -DZENITH_CUDA=ON
#
# PYTHON (default: python3) needs `pip install '.[dev]'`'s build tools. Its module lies beside those of other
# versions: cp311 for 3.11, abi3 for 3.12 and later. Build directory: build/<version>.
set -euo pipefail
cd "$(dirname "$0")/.."

python=python3
if [[ $# -gt 0 && $1 != -* ]]; then
  python=$1
  shift
fi
version=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')

# The headers of jaxlib 0.10.2, whichever jaxlib PYTHON has: CMakeLists.txt says why.
headers=build/headers
if [[ ! -e $headers/jaxlib/include/xla/ffi/api/ffi.h ]]; then
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$headers" jaxlib==0.10.2
  "$python" - "$headers" <<'PYTHON'
import glob, os, sys, zipfile

(wheel,) = glob.glob(f"{sys.argv[1]}/jaxlib-*.whl")
with zipfile.ZipFile(wheel) as archive:
    names = [n for n in archive.namelist() if n.startswith("jaxlib/include/xla/ffi/api/")]
    archive.extractall(sys.argv[1], names)
os.remove(wheel)
PYTHON
fi

"$python" -m cmake -S . -B "build/$version" -G Ninja --log-level=WARNING \
  -DCMAKE_MAKE_PROGRAM="$("$python" -c 'import ninja; print(ninja.BIN_DIR)')/ninja" \
  -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
  -DZENITH_XLA_INCLUDE_DIR="$PWD/$headers/jaxlib/include" \
  -DZENITH_IN_PLACE=ON -DZENITH_WERROR=ON "$@"
"$python" -m cmake --build "build/$version" --parallel "${JOBS:-$(nproc)}"
ls -l zenith_jax/_c*.so
