"""What a quantized weight is and how it lies in tensors: grids, our format, and those of other tools."""
