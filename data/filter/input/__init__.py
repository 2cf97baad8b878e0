"""Records and the readers that make them from files and data sets."""
