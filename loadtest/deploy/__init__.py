"""A watched deployment: server, Prometheus and Grafana, its board and its alerts."""
