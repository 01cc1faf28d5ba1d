"""The files of Physics-IQ: their layout, how the official scorer reads them, and their motion masks."""
