"""From a source of examples to audited, split `DataLoaders`."""

from .._moved import old_names

old_names(__name__)
