"""Who does the matrix products. Modules own parameters; a backend here owns only the product."""
