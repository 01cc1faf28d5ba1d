"""Physics-IQ (Motamed et al., 2025) and Physics-IQ Verified (2026) with numpy and OpenCV, equal to the official."""
