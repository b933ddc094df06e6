"""The one folder that talks to MLflow."""
