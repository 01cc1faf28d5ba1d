"""Sources of clips. Each is a module that writes clips and reports what it rejected."""
