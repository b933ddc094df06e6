"""For those who develop the project: may import everything and is imported by nothing. Not installed."""
