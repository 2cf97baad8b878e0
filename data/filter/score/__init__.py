"""Scorers: how hard a record is, by n-grams, by models, by a judge or by pass rates."""
