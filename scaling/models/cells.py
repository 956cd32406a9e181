"""How finely a scene's hull divides the box; apart from box.py, so that readers of libraries need no torch."""

CELLS = 40  # a side, whatever the cuboid's proportions
