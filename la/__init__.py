"""Label Anything: the model and its mathematics. Tensors and plain data only; no files but weights and photos."""
