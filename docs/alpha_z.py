"""Draws docs/alpha_z.svg, the cycle of alpha_z over a synthetic sequence of gradient norms: python docs/alpha_z.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt

from phantom.config import RecursiveWeight as Settings
from phantom.training.recursive_weight import RecursiveWeight

STEPS, THRESHOLD = 600, 0.6


def norms(seed: int = 0) -> np.ndarray:
    """Noisy norms that fall as the branch learns, with three spikes."""
    rng = np.random.default_rng(seed)
    step = np.arange(STEPS)
    norm = 0.25 + 0.3 * np.exp(-step / 80) + 0.03 * rng.standard_normal(STEPS)
    for at, height in ((170, 0.7), (330, 0.45), (420, 0.9)):
        norm += height * np.exp(-(((step - at) / 6) ** 2))
    return norm


def cycle(norms: np.ndarray, kind: str) -> list[float]:
    """alpha_z at each step, with the norm measured every fourth step."""
    settings = Settings(alpha_max=1.0, growth_steps=150, threshold=THRESHOLD, norm=kind, every=4, mode="exact")
    weight, used = RecursiveWeight(settings), []
    for step, norm in enumerate(norms):
        if weight.due(step):
            weight.observe(float(norm))
        used.append(weight.alpha)
        weight.advance()
    return used


def main() -> None:
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "alpha_z", "font.family": "sans-serif"}
    given = norms()
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 4.6), sharex=True, layout="constrained")
    above.plot(given, color="#4a5568", linewidth=1)
    above.axhline(THRESHOLD, color="#c53030", linewidth=1, linestyle="--")
    above.text(STEPS, THRESHOLD + 0.03, "threshold", ha="right", color="#c53030")
    above.set_ylabel("norm of dL_z / dθ")
    below.plot(cycle(given, "raw"), color="#2b6cb0", label="norm: raw")
    below.plot(cycle(given, "weighted"), color="#dd6b20", linestyle="--", label="norm: weighted")
    below.set_ylabel("alpha_z")
    below.set_xlabel("step")
    below.set_ylim(-0.05, 1.3)
    below.legend(loc="upper left", ncols=2, frameon=False)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, STEPS)
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
