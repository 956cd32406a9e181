"""What the views show of a scene, or of a set of scenes: hulls, the box around all of them, the background."""
