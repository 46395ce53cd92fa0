"""Quantized KV-cache formats: page layout, reference codec, attention kernels and scale calibration."""
