"""Judges that are small scripts: they read and write the files of the real ones, and keep count of their calls."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from phantom.config import Judge

# Scores depend on the name of the video and the task alone. As the real one, the first appends to what is there.
VIDEOPHY = """
import csv, sys, zlib
from pathlib import Path
source, target, weights = sys.argv[1:4]
with open(Path(target).parent / "calls", "a") as calls:
    calls.write(f"{Path(source).name} {weights}\\n")
rows = list(csv.DictReader(open(source, newline="")))
with open(target, "a", newline="") as file:
    for row in rows:
        score = zlib.crc32((Path(row["videopath"]).name + str("physical" in row["caption"])).encode()) % 1000 / 999
        csv.writer(file).writerow([row["videopath"], row["caption"], score])
"""
VIDEOPHY2 = """
import csv, sys, zlib
from pathlib import Path
source, target, task = sys.argv[1:4]
rows = list(csv.DictReader(open(source, newline="")))
with open(target, "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["", *rows[0], "score"])
    for number, row in enumerate(rows):
        code = zlib.crc32((Path(row["videopath"]).name + task + row.get("rule", "")).encode())
        writer.writerow([number, *row.values(), float(code % 3 if task == "rule" else 1 + code % 5)])
"""
VBENCH2 = """
import json, sys
from pathlib import Path
videos, dimension, target = sys.argv[1:4]
videos = sorted(Path(videos).glob("*.mp4"))
Path(target).mkdir(parents=True)
results = [{"video_path": str(path), "video_results": int(path.stem[-1]) / 9} for path in videos]
score = sum(r["video_results"] for r in results) / len(results)
(Path(target) / "results_1_eval_results.json").write_text(json.dumps({dimension: [score, results]}))
(Path(target) / "results_1_full_info.json").write_text("[]")
"""


def write_judge(folder: Path, script: str, places: str, weights: str | None = None) -> Judge:
    """A judge that runs `script` on `places`."""
    path = folder / "a judge.py"  # with a space, as paths may have
    path.write_text(script)
    return Judge(command=f"'{sys.executable}' '{path}' {places}", weights=weights)


def write_captions(path: Path, rows: list[dict[str, str]]) -> Path:
    """A csv of captions."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_videos(folder: Path, *names: str) -> Path:
    """Files that look like videos to whoever only reads their names and bytes."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder
