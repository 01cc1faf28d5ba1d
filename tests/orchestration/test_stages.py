"""The table of stages, and what is taken from it: dvc.yaml, the flow's options, a job's settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from phantom.config import Cluster, Compute, Params, Tracking, load_params, preset_path
from phantom.orchestration.dvc_file import code_dependencies, stage_entry, write
from phantom.orchestration.stages import STAGES, identity_files, result_settings
from tests.conftest import ROOT


def params(*overrides: str) -> Params:
    return load_params(preset_path("mini"), overrides)


@pytest.mark.parametrize("name", STAGES)
def test_dvc_yaml_says_of_a_stage_what_the_table_says(name: str):
    """`python -m phantom.orchestration.dvc_file` brings it up to date."""
    tree = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    assert list(tree["stages"]) == list(STAGES)
    assert tree["stages"][name] == stage_entry(STAGES[name], ROOT)


def test_writing_dvc_yaml_keeps_comments_and_plots(tmp_path: Path):
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    (tmp_path / "src").symlink_to(ROOT / "src")
    (tmp_path / "dvc.yaml").write_text(text.replace("- train.seed\n", "").replace("phantom encode", "phantom code"))
    write(tmp_path)
    written = (tmp_path / "dvc.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(written) == yaml.safe_load(text)
    assert [line for line in written.splitlines() if "#" in line] == [line for line in text.splitlines() if "#" in line]


def test_code_is_followed_through_imports_also_those_inside_functions(tmp_path: Path):
    sources = {
        "__init__": "",
        "a/__init__": '"""Nothing but words."""',
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


def test_what_is_read_was_written_by_a_stage_before_or_ships_with_the_code():
    written = {"models/mini"}
    for stage in STAGES.values():
        assert {str(artifact.path) for artifact in stage.reads} <= written
        written |= {str(artifact.path) for artifact in stage.writes}
        assert any(stage.written_last.is_relative_to(artifact.path) for artifact in stage.writes)
        assert all(path.is_relative_to(artifact.path) for artifact in stage.reads for path in artifact.identity), (
            stage.name
        )


def test_the_stages_that_may_be_jobs_are_those_that_compute_names():
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
        ("evaluate.physics_iq.fps=8", {"prepare", "evaluate"}),
        ("register.metric=score", {"register"}),
        ("storage.prefetch=3", set()),
    ],
)
def test_a_setting_changes_the_results_of_these_stages(override: str, stages: set[str]):
    before, after = params(), params(override)
    assert {name for name in STAGES if result_settings(name, before) != result_settings(name, after)} == stages


def test_no_result_depends_on_where_it_is_made_or_recorded():
    for name in STAGES:
        assert not {"compute", "cluster", "tracking", "storage"} & set(result_settings(name, params()))
    assert {Cluster, Compute, Tracking} <= {field.annotation for field in Params.model_fields.values()}


def test_the_files_that_stand_for_the_inputs_are_those_of_the_stages_before():
    assert [str(path) for path in identity_files("train")] == ["data/latents/index.json"]
    assert [str(path) for path in identity_files("evaluate")] == [
        "models/phantom/config.json",
        "models/phantom/history.json",
        "models/control/history.json",
    ]
