"""The one folder that talks to MLflow."""

import os

# Read when mlflow is imported: a training job on a closed cluster should not try to reach the internet, and copying a
# small file needs no bar of its own.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
