"""Compiles CUDA C++ at run time, keeps the machine code, loads and launches it; what kernels compute is not known here."""
