"""Benchmarks of physical plausibility, for the videos of any model. Physics-IQ natively, the others through their judges."""
