"""Checkpoints between epochs: what they hold, and how torn ones are found."""
