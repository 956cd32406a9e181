"""Learn thousands of 3D scenes: a shared compression model, then one small tri-plane a scene."""
