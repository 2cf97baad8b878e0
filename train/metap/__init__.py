"""MetaP inside a run: derive its hyperparameters, scale it, and measure its activations for a coordinate check."""
