"""A notebook with parameters, executed and recorded."""

from .._moved import old_names

old_names(__name__)
