"""`zenith demo`: a sentence encoder with its real weights, with jax.jit and with zenith.jit.

minilm.py is the model, plain Flax; run.py compares the two; texts.py is what the model reads.
"""

from zenith_jax.demo.run import main

__all__ = ["main"]
