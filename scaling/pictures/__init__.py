"""Pictures and videos of fitted scenes."""
