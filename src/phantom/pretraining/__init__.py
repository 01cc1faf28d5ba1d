"""`phantom pretrain`: trains the frozen parts of the mini preset."""
