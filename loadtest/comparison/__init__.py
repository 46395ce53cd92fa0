"""Runs against each other and against limits: repeats, comparisons, conditions with an exit status."""
