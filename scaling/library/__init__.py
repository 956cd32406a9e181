"""The run folder and its library of fitted scenes: parts, lease, manifest, failures, metrics."""
