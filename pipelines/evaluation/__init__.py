"""Evaluation of any method on the same episodes, its pictures, and its cost."""
