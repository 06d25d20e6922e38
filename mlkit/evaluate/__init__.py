"""Metrics with their intervals, plots, data issues, the model card."""

from .._moved import old_names

old_names(__name__)
