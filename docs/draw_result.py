"""Draws docs/result.png from the results and videos of a study: python docs/draw_result.py

Above, the frames of all worlds whose videos the study keeps: recording, frozen base, control and Phantom, of the first
seed. Below, the position error by seed. Nothing in it is chosen by hand.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from phantom.data.video import read_frames
from phantom.evaluation.study.videos import BASE, RECORDING, VIDEOS

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "studies" / "twin-first"
PICTURE = ROOT / "docs" / "result.png"
RESULTS_SHA256 = "results_sha256"  # of the results.json that the picture was drawn from: a text in the file
FIGURE = "position_error"
ROWS = {RECORDING: "Recording", BASE: "Frozen base", "control": "Control", "phantom": "Phantom"}
COLOURS = {"nearest_clip": "#8a8a8a", BASE: "#6c757d", "control": "#b8690f", "phantom": "#4f3cc9"}
TIMES = (0.15, 0.4, 0.65, 0.9)  # of each video, as shares of its length
CELL, GAP, SPACE, LABELS, LINE = 128, 4, 28, 200, 46  # pixels
INK, FAINT, PAPER = "#1b1b1f", "#d8d8dd", "#ffffff"


def results() -> dict[str, Any]:
    """results.json of the study."""
    return json.loads((STUDY / "results.json").read_text(encoding="utf-8"))


def results_sha256() -> str:
    """The digest that the picture states."""
    return hashlib.sha256((STUDY / "results.json").read_bytes()).hexdigest()


def means(found: dict[str, Any]) -> dict[str, list[float]]:
    """The mean position error in pixels, by what is drawn: one for each seed of an arm."""
    clips = {name: [found["base"]["clips"]] for name in ("nearest_clip", BASE)}
    for run in found["runs"]:
        clips.setdefault(run["arm"], []).append(run["clips"])
    keys = {"nearest_clip": f"{FIGURE}_nearest_clip"}
    rows = {name: [of[keys.get(name, FIGURE)] for of in many] for name, many in clips.items()}
    valid = {name: [[value for value in row if value is not None] for row in many] for name, many in rows.items()}
    return {name: [sum(row) / len(row) for row in many] for name, many in valid.items() if name in COLOURS}


def draw_frames(draw: ImageDraw.ImageDraw, picture: Image.Image, font: Any, top: int) -> None:
    """A row for each model, and in it some frames of every world."""
    worlds = sorted((STUDY / VIDEOS).glob("*/"))
    for row, (name, title) in enumerate(ROWS.items()):
        y = top + row * (CELL + GAP)
        draw.text((0, y + CELL // 2), title, INK, font, anchor="lm")
        for column, world in enumerate(worlds):
            frames, _ = read_frames(world / f"{name}.mp4")
            for number, share in enumerate(TIMES):
                frame = Image.fromarray(frames[int(share * len(frames))]).resize((CELL, CELL), Image.Resampling.NEAREST)
                x = LABELS + column * (len(TIMES) * (CELL + GAP) + SPACE) + number * (CELL + GAP)
                picture.paste(frame, (x, y))


def draw_errors(draw: ImageDraw.ImageDraw, font: Any, top: int, width: int) -> None:
    """A line for each model: a dot for each seed, and the mean."""
    found = means(results())
    titles = {"nearest_clip": "Nearest clip", **ROWS}
    every = [value for values in found.values() for value in values]
    low, high = int(min(every)), int(max(every)) + 1
    right = width - 330

    def place(value: float) -> float:
        return LABELS + (value - low) / (high - low) * (right - LABELS)

    bottom = top + LINE * len(found)
    for tick in range(low, high + 1):
        draw.line([(place(tick), top), (place(tick), bottom)], FAINT, 2)
        draw.text((place(tick), bottom + 6), f"{tick} px", INK, font, anchor="mt")
    for row, (name, colour) in enumerate((name, colour) for name, colour in COLOURS.items() if name in found):
        y, values = top + LINE * row + LINE // 2, found[name]
        mean = sum(values) / len(values)
        draw.text((0, y), titles[name], INK, font, anchor="lm")
        for value in values:
            draw.ellipse([place(value) - 8, y - 8, place(value) + 8, y + 8], fill=colour)
        draw.line([(place(mean), y - 18), (place(mean), y + 18)], colour, 4)
        seeds = f", {len(values)} seeds" if len(values) > 1 else ""
        draw.text((right + 24, y), f"{mean:.2f}{seeds}", INK, font, anchor="lm")
    said = "Distance of a body to the simulator's, mean of 60 held-out worlds: lower is better"
    draw.text((0, bottom + 60), said, INK, font)


def draw() -> Image.Image:
    """The picture."""
    worlds = len(list((STUDY / VIDEOS).glob("*/")))
    width = LABELS + worlds * len(TIMES) * (CELL + GAP) + (worlds - 1) * SPACE
    above = len(ROWS) * (CELL + GAP) + 30
    picture = Image.new("RGB", (width, above + LINE * len(COLOURS) + 110), PAPER)
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(30)
    draw_frames(canvas, picture, font, 0)
    draw_errors(canvas, font, above, width)
    return picture


def main() -> None:
    """Writes the picture, with the digest of the results that it shows."""
    text = PngInfo()
    text.add_text(RESULTS_SHA256, results_sha256())
    draw().save(PICTURE, pnginfo=text, optimize=True)


if __name__ == "__main__":
    main()
