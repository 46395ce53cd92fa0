"""The demonstration: the whole chain on a small model."""
