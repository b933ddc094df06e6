"""What a training run leaves on disk: its name, code and checkpoints. How it is resumed: `pipelines.training.resume`."""
