"""Side-by-side measurements of the data pipeline."""
