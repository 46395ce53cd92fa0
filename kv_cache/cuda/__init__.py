"""CUDA kernels over codes: paged decode attention, compiled at run time for the device and format at hand."""
