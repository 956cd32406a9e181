"""Posed images: the readers of the source layouts, the embedded cars and the scene store."""
