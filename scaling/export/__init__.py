"""Fitted scenes as other programs read them: planes, meshes, posed views."""
