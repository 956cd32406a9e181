#!/usr/bin/env bash
# Starts the MLflow server on the head node, unless it runs already. Its folder is ~/mlflow.
# It listens on the head's loopback only: a job's driver and Ray Train's controller, which alone write to it, run on the
# head. Open it through an ssh tunnel (README.md).
set -euo pipefail
if (exec 3<>/dev/tcp/127.0.0.1/5000) 2>/dev/null; then
  exit 0
fi
mkdir -p ~/mlflow
cd ~/mlflow
# Without these two settings the server starts 11 processes of 230 MB each.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true
# setsid: the server outlives the ssh session that starts it.
setsid nohup mlflow server --host 127.0.0.1 --port 5000 --workers 1 \
  --backend-store-uri "sqlite:///$HOME/mlflow/mlflow.db" --artifacts-destination "$HOME/mlflow/artifacts" \
  >server.log 2>&1 </dev/null &
for _ in $(seq 60); do
  if (exec 3<>/dev/tcp/127.0.0.1/5000) 2>/dev/null; then
    exit 0
  fi
  sleep 1
done
tail -n 20 server.log
echo "the MLflow server did not start within 60 s" >&2
exit 1
