"""Matmul backends. Layers own the parameters; a backend only multiplies."""
