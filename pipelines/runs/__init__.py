"""What a training run leaves on disk: name, code and checkpoints. How it is resumed: `pipelines.training.resume`."""
