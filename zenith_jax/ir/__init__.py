"""Jaxprs: reading, walking, rebuilding. Knows JAX and no op. Start at `graph.py`."""
