"""How the demo's weights were made."""
