"""CUDA devices that need not be there: what kernels compiled for them may use."""

SHARED = {(8, 0): 163 << 10, (8, 6): 99 << 10, (8, 9): 99 << 10, (9, 0): 227 << 10}
"""Shared memory that a thread block may have (CUDA C++ Programming Guide, compute capabilities)."""
