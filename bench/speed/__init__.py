"""What a KV-cache dtype gains in an engine: decode, prefill, capacity."""
