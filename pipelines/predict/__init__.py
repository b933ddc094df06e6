"""Segmenting a folder of photos, and exporting the heads."""
