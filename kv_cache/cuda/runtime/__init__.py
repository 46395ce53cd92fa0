"""Compiles CUDA C++ at run time, keeps the machine code, loads and launches it, whatever kernels compute."""
