"""Whether V-JEPA 2's predictor is more surprised by an impossible clip than by the possible one it was made from.

    python benchmarks/surprise.py [--groups N] [--model FOLDER] [--json]

On matched simulated clips (`data.sources.invalid_worlds`), with the encoder of --model: the percentage of pairs in
which the impossible clip surprises more, by violation, with the mini preset's windows and the published ones; and the
groups in which the possible clip held at its first frame surprises less than the clip.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from phantom.config import PUBLISHED_SURPRISE, Surprise, load_params, preset_path
from phantom.data.sources import invalid_worlds
from phantom.generation.surprise import load_scorer

ROOT = Path(__file__).resolve().parents[1]


def measure(groups: list[invalid_worlds.Group], model: Path, windows: Surprise) -> dict[str, float]:
    """Percent of pairs in which the impossible clip surprises more, and of groups in which a frozen one does less."""
    scorer = load_scorer(str(model), windows)
    wins: dict[str, list[bool]] = defaultdict(list)
    frozen = []
    for group in groups:
        valid = scorer(group.valid).surprise
        frozen.append(scorer(np.repeat(group.valid[:1], len(group.valid), axis=0)).surprise < valid)
        for variant in group.variants:
            if not variant.is_benign:
                wins[variant.name].append(scorer(variant.frames).surprise > valid)
    every = [win for of in wins.values() for win in of]
    shares = {name: 100 * float(np.mean(of)) for name, of in sorted(wins.items())}
    return {"pairs": len(every), "all": 100 * float(np.mean(every)), **shares, "frozen": 100 * float(np.mean(frozen))}


def main() -> None:
    """Measures and prints both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=4, help="of each of the six scenarios")
    parser.add_argument("--model", type=Path, default=ROOT / "models/mini/physics_encoder")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    params = load_params(preset_path("mini"))
    made = invalid_worlds.groups(params.data.worlds.seed, options.groups, params.evaluate.likephys.frames, 64)
    groups = list(made)
    found = {
        name: measure(groups, options.model, windows)
        for name, windows in (("mini", params.evaluate.surprise), ("published", PUBLISHED_SURPRISE))
    }
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for name, figures in found.items():
        print(f"windows: {name}")
        for key, value in figures.items():
            print(f"{key:24} {value:6.0f}" + ("" if key == "pairs" else "%"))


if __name__ == "__main__":
    main()
