"""Certify that a layout computes the same as one process, up to rounding."""
