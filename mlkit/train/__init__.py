"""The fit: checkpoints, resume, trackers, several processes."""

from .._moved import old_names

old_names(__name__)
