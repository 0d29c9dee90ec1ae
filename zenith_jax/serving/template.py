"""A saved Zenith model in Triton's Python backend. Written by zenith_jax.serving; needs zenith_jax and its jax."""

import json
import os
import pathlib
import sys


class TritonPythonModel:
    def initialize(self, args):
        folder = pathlib.Path(args["model_repository"]) / args["model_version"]
        settings = json.loads((folder / "serving.json").read_text())
        # Before JAX is imported: each instance is a process, and has its device to itself.
        if args["model_instance_kind"] == "GPU":
            # Triton counts the devices that it sees itself.
            device, visible = args["model_instance_device_id"], os.environ.get("CUDA_VISIBLE_DEVICES")
            os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(device)] if visible else device
            os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(settings["memory_fraction"]))
        else:
            os.environ["JAX_PLATFORMS"] = "cpu"
            if settings["pool_threads"] == "all but one":
                os.environ.setdefault("NPROC", str(max(1, len(os.sched_getaffinity(0)) - 1)))
        # The stub's Python ignores PYTHONPATH.
        sys.path += [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p not in sys.path]
        import triton_python_backend_utils  # pyright: ignore[reportMissingImports]

        from zenith_jax.serving.backend import Backend

        self.backend = Backend(folder, args, triton_python_backend_utils)

    def execute(self, requests):
        return self.backend.execute(requests)

    def finalize(self):
        self.backend.close()
