"""The jobs: files, Ray and MLflow around the model of `la`."""
