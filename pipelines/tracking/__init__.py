"""The one folder that talks to MLflow."""

import os

# Read when mlflow is imported: a training job on a closed cluster should not try to reach the internet.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
