"""From inputs to predictions, without torch: readers, engines, batches."""

from .._moved import old_names

old_names(__name__)
