"""The models of a registry over HTTP."""

from .._moved import old_names

old_names(__name__)
