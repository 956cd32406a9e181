"""What throughput.py measures with."""
