"""What step.py times: the parts of a step."""
