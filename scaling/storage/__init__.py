"""Bytes and paths: whole files, object stores; tables, tensors, JSON and YAML from strangers."""
