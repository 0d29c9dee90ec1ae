"""Any model as one compiled function that can be saved: `compile`, `CompiledModel`, `load`. See docs/compile.md.

compile.py makes a CompiledModel (model.py) from a frontend's Source, saved.py writes and reads it as one file
(archive.py). buckets.py: dimensions of several sizes. structure.py: pytrees as arrays and the rest.
"""

from zenith_jax.compiled.compile import compile
from zenith_jax.compiled.model import Benchmark, CompiledModel
from zenith_jax.compiled.saved import load

__all__ = ["Benchmark", "CompiledModel", "compile", "load"]
