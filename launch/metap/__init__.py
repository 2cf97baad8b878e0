"""MetaP experiments: coordinate checks, sweeps, searches, fits and transfers."""
