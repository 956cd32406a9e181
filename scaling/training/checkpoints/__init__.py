"""Checkpoints between epochs: what they hold, and how a torn one is told."""
