"""Arithmetic of quantized layers at serving time; each kernel lies beside its plain PyTorch specification."""
