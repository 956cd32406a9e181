"""Many processes: Ray Data prepares, Ray Train trains stage 1, Ray actors fit stage 2, Ray Tune sweeps, MLflow tracks.

The only part of the package that imports ray or mlflow.
"""

import os

# No usage statistics are sent unless the user asks for it.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# Without this variable Ray warns on every start that a later version will change what it sets for CPU actors.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
