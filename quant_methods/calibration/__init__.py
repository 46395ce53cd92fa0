"""Runs a model block by block over calibration text, and gathers what methods need to know."""
