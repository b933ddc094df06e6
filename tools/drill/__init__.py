"""The failure drill: everything that can die is killed once."""
