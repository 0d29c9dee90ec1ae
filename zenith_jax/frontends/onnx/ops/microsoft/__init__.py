"""The domain com.microsoft: operators that ONNX Runtime's optimiser and its exporters write.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

import functools as ft
import importlib
import pkgutil

from zenith_jax.frontends.onnx.registry import MICROSOFT, operator

contrib = ft.partial(operator, domain=MICROSOFT)

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
