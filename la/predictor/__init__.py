"""The trained model on photos and prompts of one's own."""
