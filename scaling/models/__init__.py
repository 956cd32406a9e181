"""Tri-planes, field, renderer, autoencoder, and the shared model that holds them."""
