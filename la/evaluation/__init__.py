"""Metrics, losses and training-free baselines (paper section 5.1)."""
