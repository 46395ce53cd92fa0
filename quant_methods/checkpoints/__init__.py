"""Checkpoints on disk: reading sources, writing compressed ones, and running either in float32."""
