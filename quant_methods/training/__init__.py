"""Trains whole models that are or will be compressed: tuning, recovery after pruning, movement pruning."""
