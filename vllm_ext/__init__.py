"""The vLLM plugin: KV-cache dtypes, attention backend, metrics, and the ``pareto`` command's front door."""
