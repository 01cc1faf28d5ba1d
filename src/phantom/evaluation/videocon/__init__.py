"""The judges of VideoPhy and VideoPhy-2 on current transformers: mPLUG-Owl for video, in one process."""
