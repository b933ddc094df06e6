"""The jobs: files, Ray and MLflow around the model of `la`."""

import os

# Read when Ray is imported. With it, threads of this process go on exporting metrics after `ray.shutdown()` and can
# crash it as it ends.
os.environ.setdefault("RAY_enable_open_telemetry", "0")
