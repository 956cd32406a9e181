"""Readers of the layouts that posed images come in; `registry` finds the one that fits."""
