"""What runs when, on this machine: the stages, `phantom run`, `up`, `study`, `doctor` and approval."""
