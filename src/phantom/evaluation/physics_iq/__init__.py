"""Physics-IQ (Motamed et al., 2025) and Physics-IQ Verified (2026) in numpy and OpenCV, equal to the official."""
