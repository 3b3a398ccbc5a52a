"""Depth: log-depth pictures, ensembles, metrics, colours, and depth files."""
