"""MetaP inside a run: resolve its hyperparameters, scale it, and measure its activations for a coordinate check."""
