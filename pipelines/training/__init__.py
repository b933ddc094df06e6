"""The training loop, in this process or on Ray Train."""
