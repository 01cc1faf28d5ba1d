"""The files of Physics-IQ: where they lie, how they are read, and the masks that are stored with them."""
