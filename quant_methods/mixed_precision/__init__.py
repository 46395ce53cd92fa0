"""Gives each layer a width of its own: what widths cost, what they lose, and what a budget buys."""
