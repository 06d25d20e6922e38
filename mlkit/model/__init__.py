"""A `Learner` by name, and what its outputs mean."""

from .._moved import old_names

old_names(__name__)
