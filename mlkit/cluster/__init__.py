"""Ray, when one machine is not enough."""

from .._moved import old_names

old_names(__name__)
