"""From somebody else's export to a bundle, in a sandbox."""

from .._moved import old_names

old_names(__name__)
