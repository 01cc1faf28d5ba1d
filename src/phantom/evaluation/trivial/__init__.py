"""Predictions without a model, scored like the videos of a model: they say what a score on the scale is worth."""
