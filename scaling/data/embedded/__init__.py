"""Procedural cars, for the quickstart, the tests and first experiments."""
