"""What a layer's weight is made of: one part a file, from its arithmetic to its tensors in a checkpoint."""
