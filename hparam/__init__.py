"""MetaP: hyperparameters found on a small model, transferred to a large one by scaling rules per parameter role."""
