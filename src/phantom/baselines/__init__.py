"""What the field compares with, that is neither a model nor a way of sampling: a simulator that looks at the pixels."""
