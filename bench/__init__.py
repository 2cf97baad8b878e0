"""Side-by-side measurements, each a ratio of two things done in one process."""
