"""What is measured of videos of simulated worlds, whose physics is known (`trajectories`, `shapes`)."""

from __future__ import annotations

from phantom.evaluation.protocol import Figure

WORLDS = (
    Figure(
        "position_error",
        "Position error",
        "of the bodies, at 64 x 64; 16 where one is not found",
        1,
        -1,
        unit="px",
    ),
    Figure(
        "position_error_unseen",
        "… beyond training",
        "where parameters lie outside the trained ranges",
        1,
        -1,
        unit="px",
    ),
    Figure("missing", "Body missing", "of the frames that should show it", 1, -1, 100, "%"),
    Figure(
        "shape_kept",
        "Shape kept",
        "of the frames that show a body: its area, within 20%, and its colour",
        0,
        1,
        100,
        "%",
    ),
    Figure("starts_on_time", "Starts on time", "of the bodies that move: within half a second", 0, 1, 100, "%"),
    Figure(
        "energy_drift",
        "Energy drift",
        "departure from the energy that is conserved, before something is touched",
        0,
        -1,
        100,
        "%",
    ),
    Figure("momentum_drift", "Momentum drift", "the same of colliding balls' momentum", 0, -1, 100, "%"),
)
