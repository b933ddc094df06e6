"""A search for settings of training, judged on seen classes."""
