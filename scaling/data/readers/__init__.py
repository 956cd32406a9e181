"""Readers of the layouts of posed images; `registry` finds the reader that fits a source."""
