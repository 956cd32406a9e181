"""Whole numbers as few bytes."""
