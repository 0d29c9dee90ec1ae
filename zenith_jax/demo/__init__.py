"""`zenith demo`: a sentence encoder with its real weights, with jax.jit and with zenith.jit.

minilm.py is the model, plain Flax; texts.py is what it reads; run.py compares the two.
"""
