"""What a run leaves: the library of fitted scenes, its metrics and its pictures."""
