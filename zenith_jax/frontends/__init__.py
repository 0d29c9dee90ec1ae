"""Ways in: from a model of another framework or file format to a JAX function and its parameters."""
