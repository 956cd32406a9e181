"""The parts of a step that step.py times."""
