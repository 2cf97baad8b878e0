"""Tests of the planner's search. What it computes for arrays of candidates is compared with the framework's own code."""
