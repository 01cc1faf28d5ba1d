"""Makes the frozen parts of the mini preset: `phantom pretrain`."""
