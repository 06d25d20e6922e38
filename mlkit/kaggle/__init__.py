"""Datasets, competitions and kernels on Kaggle."""

from .._moved import old_names

old_names(__name__)
