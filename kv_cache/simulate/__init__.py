"""Coders of keys and values in plain PyTorch: what a KV-cache format costs, before any kernel is written for it."""
