"""The model, one part of the paper's section 4 a file, and the hybrid."""
