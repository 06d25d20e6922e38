"""From a fitted `Learner` to a bundle that answers alike."""

from .._moved import old_names

old_names(__name__)
