"""Studies: plain functions that return variants, and the runner that trains and evaluates each on every fold."""
