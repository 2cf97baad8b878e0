"""Run the training step of any rank of a large world on meta tensors, and report what it does."""
