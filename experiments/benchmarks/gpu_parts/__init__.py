"""The parts of gpu_run.py."""
