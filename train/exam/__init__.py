"""Examinations of trained models: questions whose answers are judged by what they say or do."""
