"""Fit the planner's constants to published runs."""
