"""Studies: plain functions that return variants, and the runner that trains and evaluates each on every fold."""

import pipelines  # noqa: F401  what Ray reads when it is imported
