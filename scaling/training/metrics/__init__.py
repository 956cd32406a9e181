"""Metrics: how close a render is to the true image."""
