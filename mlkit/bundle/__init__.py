"""The portable model: what is in it, how it is written and read, and the registry of versions."""

from .._moved import old_names

old_names(__name__)
