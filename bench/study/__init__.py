"""A study of filtering: which models gain from leaving out easy problems."""
