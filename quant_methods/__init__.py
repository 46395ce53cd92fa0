"""Offline weight compression: a Hugging Face model and a recipe in, a checkpoint that vLLM loads out."""
