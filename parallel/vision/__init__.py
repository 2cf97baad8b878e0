"""The vision encoder on many ranks."""
