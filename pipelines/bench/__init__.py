"""Speed as ratios measured in one run, and what a study will cost."""
