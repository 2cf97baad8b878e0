"""Errors, typed configuration and atomic files for all other packages. Imports no other package of Leviathan."""
