"""Coding: whole numbers as few bytes."""
