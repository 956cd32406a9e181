"""Posed images: the readers of source layouts, the embedded cars and the scene store."""
