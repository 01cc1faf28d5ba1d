"""A temporary checkout with this project's dvc.yaml and params.yaml, and stubs of the stages that only write files.

For tests of the pipeline around the stages: what DVC reruns, how failures and interruptions are reported, what Prefect
records. DVC, Prefect and the process tree are real.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def load_flow(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module flows/<name>.py, under the name that Prefect finds it by."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"flows/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


STAGE = """
import json, signal, sys, time
from pathlib import Path
from phantom.errors import Interrupted, UserError
from phantom.errors import write_outcome

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.default_int_handler)
name = sys.argv[1]
with open("calls", "a") as calls:
    calls.write(name + "\\n")

def work():
    if Path("fail").is_file() and Path("fail").read_text() == name:
        raise UserError(f"{name}: found nothing, accepted: something")
    for step in range(1, 4):
        print(f"{name}: {step}/3 steps, 1.0 steps/s, 0 s left", file=sys.stderr, flush=True)
        if Path("slow").is_file() and Path("slow").read_text() == name:
            Path("started").touch()
            time.sleep(30)
    params = Path("params.yaml").read_text()
    if name == "prepare":
        write("data/clips/manifest.parquet", "clips")
        write("data/benchmark/README.md", "benchmark")
    elif name == "encode":
        write("data/latents/index.json", "latents")
    elif name == "train":
        write("models/phantom/config.json", params)
        write("models/phantom/history.json", "[]")
        write("models/control/config.json", params)
    elif name == "evaluate":
        figures = {"score": float(len(params)), "mse": 0.5}
        tree = {"score": 1.0, "physics_iq": {"single": {"base": figures, "phantom": figures}}, "of": params}
        write("reports/evaluation.json", json.dumps(tree))
        write("reports/index.html", params)
    else:
        made = {"name": "phantom", "version": 1, "champion": True, "experiment_id": "1", "run_id": "abc"}
        write("reports/registered.json", json.dumps(made))

def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)

code, error = 0, ""
try:
    work()
except UserError as wrong:
    code, error = 2, str(wrong)
except KeyboardInterrupt:
    code, error = 75, f"{name}: interrupted after saving"
write_outcome(code, error)
sys.exit(code)
"""


def make_checkout(folder: Path) -> Path:
    """Creates the checkout in `folder`, a git repository with this one's DVC configuration."""
    pipeline = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    for name, stage in pipeline["stages"].items():
        stage["cmd"] = f"python stage.py {name}"
        stage["deps"] = [dep for dep in stage["deps"] if not dep.startswith("src/")] + ["stage.py"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dvc.yaml").write_text(yaml.safe_dump(pipeline), encoding="utf-8")
    (folder / "stage.py").write_text(STAGE, encoding="utf-8")
    for name in ("params.yaml", ".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache"))
    (folder / "models/mini").mkdir(parents=True)
    (folder / "models/mini/model_index.json").write_text("{}", encoding="utf-8")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    return folder


def calls(folder: Path) -> list[str]:
    """The stages that ran since the last call."""
    path = folder / "calls"
    made = path.read_text(encoding="utf-8").split() if path.is_file() else []
    path.unlink(missing_ok=True)
    return made
