"""Fine-tuning: adapters of low rank learn over compressed weights, and are served beside them or merged into them."""
