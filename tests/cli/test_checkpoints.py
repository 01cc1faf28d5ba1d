"""`phantom checkpoints`: list, verify, export, prune, and errors in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from phantom import PhantomTransformer3DModel
from phantom.cli import main
from phantom.training.trainer import train
from tests.training.random_latents import write_latents
from tests.training.runs import QUICK, weights


@pytest.fixture
def phantom(tmp_path, monkeypatch, make_params, capsys):
    """`phantom("list")` runs `phantom checkpoints list` after a run of 6 steps: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    params = make_params(*QUICK, "train.keep_checkpoints=3", "train.ema_decay=0.5", "train.export_dtype=bfloat16")
    write_latents(Path(), params)
    train(params)
    Path("params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json", by_alias=True)), encoding="utf-8")

    def run(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["phantom", "checkpoints", *args])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return end.value.code, said.out, said.err

    return run


def test_checkpoints_are_listed_verified_exported_and_pruned(phantom, tiny_base):
    (folder,) = Path("checkpoints").glob("phantom-*")
    code, out, _ = phantom("list")
    assert code == 0 and [line.partition(":")[0] for line in out.splitlines()] == [
        f"{folder.name}/step-000000{step}" for step in (2, 4, 6)
    ]
    code, out, _ = phantom("list", folder.name, "--json")
    assert [row["bytes"] > 0 for row in json.loads(out)] == [True] * 3

    assert phantom("verify", folder.name)[:2] == (0, "".join(f"step-000000{step}: whole\n" for step in (2, 4, 6)))
    shard = folder / "step-0000006/__0_0.distcp"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    code, out, err = phantom("verify", str(folder))
    assert code == 1 and f"step-0000006: __0_0.distcp: {len(data) - 1} bytes, {len(data)} were written" in out
    assert err == f"{folder}: 1 of 3 checkpoints are not whole: step-0000006\n"
    assert phantom("export", folder.name, "--out", "four")[0] == 0  # the newest that is whole
    shard.write_bytes(data)

    assert phantom("export", folder.name, "--out", "six", "--dtype", "float32", "--step", "6")[0] == 0
    assert phantom("export", folder.name, "--out", "half", "--step", "6")[0] == 0
    exported = weights()  # by the run, in bfloat16 but for the modules that stay float32
    half, six, four = (load_file(f"{name}/diffusion_pytorch_model.safetensors") for name in ("half", "six", "four"))
    assert all(w.dtype == half[name].dtype and torch.equal(w, half[name]) for name, w in exported.items())
    exact = {name for name, w in half.items() if w.dtype == torch.float32}
    assert exact == {name for name in half if set(PhantomTransformer3DModel._keep_in_fp32_modules) & {*name.split(".")}}
    assert all(half[name].dtype == torch.bfloat16 for name in half.keys() - exact)
    assert all(w.dtype == torch.float32 and torch.equal(w.to(half[name].dtype), half[name]) for name, w in six.items())
    assert any(not torch.equal(four[name].float(), half[name].float()) for name in half)
    base = WanTransformer3DModel.from_pretrained(str(tiny_base), subfolder="transformer")
    assert PhantomTransformer3DModel.from_export("six", base).config.metadata["trained"]["steps"] == 6

    code, out, _ = phantom("prune", folder.name, "--keep", "1")
    assert (code, out) == (0, "deleted step-0000002\ndeleted step-0000004\n")
    assert [path.name for path in folder.glob("step-*")] == ["step-0000006"]


def test_wrong_arguments_are_one_line(phantom):
    (folder,) = Path("checkpoints").glob("phantom-*")
    assert phantom("verify", "phantom-0") == (
        2,
        "",
        f"phantom-0: no checkpoints in checkpoints/phantom-0; accepted: a folder, or one of {folder.name}\n",
    )
    code, _, err = phantom("export", folder.name, "--out", "new", "--step", "5")
    assert code == 2 and err == f"--step: {folder.name} has no checkpoint of step 5; accepted: 2, 4, 6\n"
    code, _, err = phantom("export", folder.name, "--out", "models")
    assert code == 2 and err == "--out: models: it exists; accepted: a new folder\n"
    code, _, err = phantom("export", folder.name, "--out", "new", "--dtype", "int8")
    assert code == 2 and err == "--dtype: found 'int8', accepted: float32, bfloat16\n"
