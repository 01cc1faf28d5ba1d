"""The force prompt: pushes and wind as a condition of a video, as data."""
