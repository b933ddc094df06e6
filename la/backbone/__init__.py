"""The frozen ViT and the features that it gives (paper section 4.1)."""
