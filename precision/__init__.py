"""Matrix products. Layers own the parameters; a backend only multiplies."""
