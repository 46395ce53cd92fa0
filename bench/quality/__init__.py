"""What compression costs: perplexity, KL divergence, retrieval, through the engine that serves."""
