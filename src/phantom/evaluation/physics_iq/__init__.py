"""Physics-IQ (Motamed et al., 2025) and Physics-IQ Verified (2026): numpy and OpenCV only, equal to the official scorer."""
