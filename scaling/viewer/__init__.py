"""A page on loopback to browse a library."""
