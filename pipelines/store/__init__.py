"""How features are stored: made, read, checked, converted and copied."""
