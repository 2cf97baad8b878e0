"""Side-by-side measurements: ratios of two computations in one process."""
