"""What views say of a scene and of a set of scenes: hulls, the box around all, the background."""
