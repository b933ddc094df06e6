"""What `plan` says, held against real runs."""
