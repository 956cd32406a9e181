"""How near a render is to the truth."""
