"""Recorded traffic: when requests came, how long they were, and which beginnings they shared."""
