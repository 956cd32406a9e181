"""Many processes: Ray Data prepares, Ray Train trains stage 1, Ray actors fit stage 2, MLflow tracks.

The only place that imports ray or mlflow.
"""

import os

# A run reports to nobody unless its user asked for it.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# Without it Ray warns on every start that a later version will change what it sets for CPU actors.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
