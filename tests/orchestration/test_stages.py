"""The table of stages, and what is derived from it: dvc.yaml and the settings of a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from phantom.cluster.submit import run_job
from phantom.config import Cluster, Compute, Params, Role, Tracking, load_params, preset_path, select
from phantom.data import manifest, prepare, shards
from phantom.errors import UserError
from phantom.evaluation import stage as evaluation
from phantom.orchestration import stages
from phantom.orchestration.dvc_file import code_dependencies, stage_entry, write
from phantom.orchestration.run import run_stage
from phantom.orchestration.stages import STAGES, identity_files, result_settings, unlisted_settings
from phantom.tracking import registry
from phantom.training import run_identity
from tests.conftest import ROOT


def params(*overrides: str) -> Params:
    return load_params(preset_path("mini"), overrides)


@pytest.mark.parametrize("name", STAGES)
def test_dvc_yaml_is_up_to_date(name: str):
    """If not, run `python -m phantom.orchestration.dvc_file`."""
    tree = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    assert list(tree["stages"]) == list(STAGES)
    assert tree["stages"][name] == stage_entry(STAGES[name], ROOT)


def test_updating_dvc_yaml_keeps_comments_and_plots(tmp_path: Path):
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    (tmp_path / "src").symlink_to(ROOT / "src")
    (tmp_path / "dvc.yaml").write_text(text.replace("- train.seed\n", "").replace("phantom encode", "phantom code"))
    write(tmp_path)
    written = (tmp_path / "dvc.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(written) == yaml.safe_load(text)
    assert [line for line in written.splitlines() if "#" in line] == [line for line in text.splitlines() if "#" in line]


def test_code_dependencies_follow_imports_also_inside_functions(tmp_path: Path):
    sources = {
        "__init__": "",
        "a/__init__": '"""Only a docstring."""',
        "a/start": "def f():\n    from phantom.b import helper\n",
        "a/other": "",
        "b/__init__": "import phantom.c.whole\n",
        "b/helper": "from phantom.tracking import runs\n",
        "c/whole": "import phantom.a.start\n",
        "tracking/runs": "from phantom.a import other\n",
    }
    for name, text in sources.items():
        file = tmp_path / f"src/phantom/{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    expected = ["src/phantom/a/start.py", "src/phantom/b", "src/phantom/c"]
    assert code_dependencies(("phantom.a.start",), tmp_path) == expected


def test_stages_read_only_outputs_of_earlier_ones_and_shipped_files():
    written = {"models/mini"}
    for stage in STAGES.values():
        assert {str(artifact.path) for artifact in stage.reads} <= written
        written |= {str(artifact.path) for artifact in stage.writes}
        assert any(stage.written_last.is_relative_to(artifact.path) for artifact in stage.writes)
        assert all(path.is_relative_to(artifact.path) for artifact in stage.reads for path in artifact.identity), (
            stage.name
        )


def test_the_stages_name_the_same_paths_in_their_code():
    """They may not import the table, which is in a higher layer."""
    assert (stages.CLIPS.path, *stages.CLIPS.identity) == (manifest.CLIPS, manifest.CLIPS / manifest.MANIFEST)
    assert (stages.LATENTS.path, *stages.LATENTS.identity) == (shards.LATENTS, shards.LATENTS / shards.INDEX)
    assert stages.BENCHMARK.path == prepare.BENCHMARK
    assert (stages.EVALUATION.path, stages.REPORT.path) == (evaluation.EVALUATION, evaluation.PAGE)
    assert (stages.EVALUATION.path, stages.REPORT.path) == (registry.EVALUATION, registry.PAGE)
    assert (stages.PHANTOM.path, stages.REGISTERED.path) == (registry.EXPORT, registry.REGISTERED)


def test_a_training_run_is_identified_by_the_settings_of_its_stage(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, ...]] = []

    def record(tree: Params, names: tuple[str, ...], without: tuple[Role, ...]) -> dict[str, Any]:
        asked.append(names)
        return select(tree, names, without)

    monkeypatch.setattr(run_identity, "identity", record)
    run_identity.run_identity(params(), "latents", held=False)
    assert [set(names) for names in asked] == [set(STAGES["train"].settings)]


def test_compute_has_the_stages_that_can_run_as_jobs():
    assert [name for name, stage in STAGES.items() if stage.runs_as_job] == list(Compute.model_fields)


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("train.seed=9", {"train"}),
        ("train.log_every=7", {"train"}),  # it changes history.json
        ("train.checkpoint_every=7", set()),
        ("encode.batch_size=7", set()),
        ("encode.seed=7", {"encode"}),
        ("train.physics_latents=online", {"encode", "train"}),
        ("models.dtype=bfloat16", {"encode", "train", "evaluate"}),
        ("data.fps=6", {"prepare", "encode", "evaluate"}),
        ("data.heldout=0.3", {"prepare"}),
        ("data.filter=cuts == 0", {"train"}),
        ("evaluate.physics_iq.fps=8", {"prepare", "evaluate"}),
        ("register.metric=score", {"register"}),
        ("storage.prefetch=3", set()),
    ],
)
def test_a_setting_affects_the_results_of_these_stages(override: str, stages: set[str]):
    before, after = params(), params(override)
    assert {name for name in STAGES if result_settings(name, before) != result_settings(name, after)} == stages


def test_results_do_not_depend_on_where_they_are_made_or_recorded():
    for name in STAGES:
        assert not {"compute", "cluster", "tracking", "storage"} & set(result_settings(name, params()))
    assert {Cluster, Compute, Tracking} <= {field.annotation for field in Params.model_fields.values()}


def test_settings_that_dvc_yaml_does_not_name_are_known_where_they_are_not_at_their_default():
    assert not any(unlisted_settings(name, params()) for name in STAGES)
    assert not unlisted_settings("train", params("train.lora.rank=4"))  # without meaning for Phantom
    changed = params("train.init_from=models/start", "train.export_dtype=float32", "train.steps=3")
    found = {"train": {"init_from": "models/start", "export_dtype": "float32"}}
    assert {name: of for name in STAGES if (of := unlisted_settings(name, changed))} == {"train": found}


def test_identity_files_are_outputs_of_earlier_stages():
    assert [str(path) for path in identity_files("train")] == ["data/latents/index.json"]
    assert [str(path) for path in identity_files("evaluate")] == [
        "data/clips/manifest.parquet",
        "models/phantom/config.json",
        "models/phantom/history.json",
        "models/control/history.json",
    ]


def test_adapters_are_not_trained_by_the_pipeline_nor_as_a_job(tmp_path: Path):
    lora = params("train.method=lora")
    with pytest.raises(
        UserError, match=r"^train\.method: found lora, accepted in the pipeline: phantom; `phantom train`"
    ):
        run_stage("train", lora, tmp_path)
    with pytest.raises(
        UserError, match=r"^train\.method: found lora, accepted with compute\.train kubernetes: phantom$"
    ):
        run_job("train", lora, tmp_path)
    assert not list(tmp_path.iterdir())
