"""Photos, annotations, masks and folds: what a data set is, before any feature."""
