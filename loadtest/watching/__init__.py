"""What is watched while the load runs: our own metrics for Prometheus, and the server's."""
