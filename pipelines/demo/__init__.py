"""A synthetic data set and a small backbone, so that a run needs no network and no download."""
