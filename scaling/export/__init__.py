"""Fitted scenes in formats that other programs read: planes, meshes, posed views."""
