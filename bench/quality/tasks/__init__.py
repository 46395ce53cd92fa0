"""Tasks of lm-eval in this project's engine: what they ask, and how it is scored over quantized pages."""
