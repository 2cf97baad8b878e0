"""MetaP inside a run: resolved hyperparameters, scaled families, coordinates."""
