"""MetaP experiments: sweeps, searches and fits."""
