"""Load tests for any OpenAI-compatible endpoint: Locust users, exact percentiles, Prometheus exporter."""
