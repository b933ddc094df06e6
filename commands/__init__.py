"""The verbs of the shell: each parses, calls one function and prints."""
