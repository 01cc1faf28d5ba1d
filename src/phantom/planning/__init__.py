"""What a run needs before it starts: parameters, FLOPs, memory, storage and hours (`phantom plan`)."""
