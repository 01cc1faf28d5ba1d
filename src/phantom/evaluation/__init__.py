"""Benchmarks of physical plausibility for the videos of any model: Physics-IQ natively, others by their judges."""
