"""Llama 4's vision encoder, and the placing of its output among the token embeddings."""
