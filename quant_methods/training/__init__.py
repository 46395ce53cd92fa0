"""Trains whole models (tuning, recovery, movement pruning); and the log, card and checkpoints of long trainings."""
