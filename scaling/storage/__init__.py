"""Bytes and paths: atomic files and object stores; tables, tensors, JSON and YAML of unknown origin."""
