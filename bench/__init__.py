"""Measurement: quality, memory, speed, and the report that shows them side by side."""
