"""What runs when, on this machine: the stages, `phantom run`, `phantom up`, approval and `phantom doctor`."""
