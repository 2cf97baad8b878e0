"""Contrastive training of two towers on image-caption pairs."""
