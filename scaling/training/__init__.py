"""Training the shared model and fitting scenes, in one process, on a CPU or a GPU."""
