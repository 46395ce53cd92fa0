"""Kernels for weights that vLLM has none for, each beside its PyTorch specification."""
