"""Settings: presets load, and anything invalid is reported in one line that names the field."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from phantom.config import (
    Params,
    all_keys,
    apply_overrides,
    field_of,
    identity,
    load_params,
    preset_names,
    preset_path,
    select,
    validate,
)
from phantom.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
MINI = yaml.safe_load(preset_path("mini").read_text(encoding="utf-8"))


def test_every_preset_loads_and_states_its_name():
    assert preset_names() == ["mini", "wan2.2-ti2v-5b", "wan2.2-ti2v-5b-1gpu"]
    for name in preset_names():
        assert load_params(preset_path(name)).preset == name


def test_settings_of_an_earlier_version_load_and_mean_what_they_meant():
    tree = copy.deepcopy(MINI)
    for key in (
        "method",
        "lora",
        "alignment",
        "init_from",
        "export_dtype",
        "mesh",
        "offload",
        "memory_check",
        "profile",
        "selective_every",
        "attention_backend",
        "force_dropout",
    ):
        del tree["train"][key]
    former = validate(tree)
    assert former.train.method == "phantom"
    # What identifies a result keeps its hash: checkpoints and runs of studies from before are found again.
    for change in ((), ("train.lora.rank=8",), ("train.alignment.block=2",), ("train.force_dropout=0.3",)):
        found = identity(validate(apply_overrides(tree, change)), ("train",), without=())
        assert found["train"].keys() == tree["train"].keys()
    for key in ("phyground", "vlm", "surprise"):
        del tree["evaluate"][key]
    for key in ("forced", "fps", "more_balls", "pairs"):
        del tree["data"]["worlds"][key]
    assert identity(validate(tree), ("data",), without=())["data"]["worlds"].keys() == tree["data"]["worlds"].keys()
    for key in ("modality_guidance_scale", "refine", "best_of"):
        del tree["evaluate"]["sampling"][key]
    found = identity(validate(tree), ("evaluate",), without=())["evaluate"]
    assert found.keys() == tree["evaluate"].keys() and found["sampling"].keys() == tree["evaluate"]["sampling"].keys()
    lora = validate(apply_overrides(tree, ["train.method=lora", "train.lora.rank=8"]))
    assert identity(lora, ("train",), without=())["train"]["lora"]["rank"] == 8
    both = validate(apply_overrides(tree, ["train.lora.rank=8", "train.alignment.block=2"]))
    for method, names in (("lora", {"lora"}), ("alignment", {"lora", "alignment"})):
        of_method = both.model_copy(update={"train": both.train.model_copy(update={"method": method})})
        assert {"lora", "alignment"} & identity(of_method, ("train",), without=())["train"].keys() == names
    forced = validate(apply_overrides(tree, ["train.force_dropout=0.3", "physics.force=video"]))
    assert identity(forced, ("train",), without=())["train"]["force_dropout"] == 0.3


def test_params_yaml_is_the_mini_preset():
    assert (ROOT / "params.yaml").read_bytes() == preset_path("mini").read_bytes()


def test_the_preset_for_one_gpu_is_the_large_one_but_for_what_makes_it_fit():
    many, one = (preset_path(f"wan2.2-ti2v-5b{end}").read_text(encoding="utf-8").splitlines() for end in ("", "-1gpu"))
    changed = {line.split(":")[0].strip() for line in set(many) ^ set(one) if not line.startswith("#")}
    assert changed == {"preset", "num_layers", "accumulation", "processes", "strategy", "offload"}


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_states_every_setting_and_the_code_holds_no_other_defaults(name: str):
    """The code's only defaults are of settings that files of an earlier version do not state."""
    tree = yaml.safe_load(preset_path(name).read_text(encoding="utf-8"))
    assert paths_of(tree, leaves=True) == {tuple(key.split(".")) for key in all_keys()}
    for path in paths_of(tree):
        without = copy.deepcopy(tree)
        del parent_of(without, path)[path[-1]]
        field = field_of(".".join(path))
        if not field.is_required():
            stated = copy.deepcopy(tree)
            parent_of(stated, path)[path[-1]] = field.default
            assert validate(without) == validate(stated)
            continue
        with pytest.raises(UserError, match=rf"^params: {'.'.join(path)}(\.\w+)*: missing"):
            validate(without)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stepz=3", "train.stepz: unknown setting; nearest: train.steps"),
        ("steps=3", "steps: unknown setting; nearest: train.steps"),
        ("trian.steps=3", "trian: unknown setting; nearest: train"),
        ("train.steps=0", "train.steps: found 0, accepted: >= 1; nearest valid: 1"),
        ("train.steps=many", "train.steps: found 'many' (str), input should be a valid integer"),
        ("train.steps=yes", "train.steps: found True (bool), input should be a valid integer"),
        ("train.steps=2.5", "train.steps: found 2.5 (float), input should be a valid integer"),
        ("train.strategy=dpp", "train.strategy: found 'dpp', accepted: ddp, fsdp2, zero1, zero2, zero3; nearest: ddp"),
        ("train.conditioned=1.5", "train.conditioned: found 1.5, accepted: <= 1.0; nearest valid: 1.0"),
        ("train.conditioned=.nan", "train.conditioned: found nan (float), input should be a finite number"),
        ("train.optimizer.learning_rate=0", "train.optimizer.learning_rate: found 0, accepted: > 0.0"),
        ("train.optimizer.betas=[0.9]", "train.optimizer.betas: found [0.9] (list), too few values"),
        ("train.optimizer=3", "train.optimizer: found 3 (int), expected a mapping of settings"),
        ("train.batch_size=15", "train.batch_size 15 must divide by accumulation x processes = 2; nearest valid: 16"),
        ("train.mesh.shard=2", "train.mesh goes with strategy fsdp2; found strategy ddp; accepted: no mesh"),
        ("data.frames=28", "data.frames must be 4m + 1, found 28; nearest valid: 29"),
        ("data.min_frames=33", "data.min_frames 33 is more than frames 29; nearest valid: 29"),
        ("data.source=folder", "data.path must name a folder when source is folder"),
        ("encode.max_prefix_frames=8", "encode.max_prefix_frames must be 4m + 1, found 8; nearest valid: 9"),
        (
            "evaluate.physics_iq.prefix_frames=2",
            "evaluate.physics_iq.prefix_frames must be 4m + 1, found 2; nearest valid: 1",
        ),
        (
            "evaluate.physics_iq.modes=[single, mult]",
            "evaluate.physics_iq.modes: found 'mult', accepted: single, multi; nearest: multi",
        ),
        (
            "evaluate.surprise.window=9",
            "evaluate.surprise.window: found 9, accepted: even numbers (tubelets of 2 frames)",
        ),
        (
            "evaluate.surprise.context=8",
            "evaluate.surprise.context, window and frames: found 8, 8 and 49, accepted: context < window <= frames",
        ),
        (
            "coupling.blocks=some",
            "coupling.blocks: found 'some', accepted: all, a number n >= 1 for every n-th, or a list of block indices",
        ),
    ],
)
def test_a_mistake_is_one_line_naming_the_field_and_what_is_accepted(tmp_path: Path, override: str, said: str):
    file = tmp_path / "params.yaml"
    file.write_bytes(preset_path("mini").read_bytes())
    with pytest.raises(UserError) as error:
        load_params(file, ["train.processes=2", override])
    assert str(error.value) == f"{file}: {said}"


@pytest.mark.parametrize(
    ("mesh", "shape"),
    [
        ([], (1, 8)),
        (["replicate=2"], (2, 4)),
        (["shard=4"], (2, 4)),
        (["replicate=2", "shard=4"], (2, 4)),
        (["shard=3"], "mesh.shard 3 must divide 8 processes; nearest valid: 2"),
        (["shard=16"], "mesh.shard 16 must divide 8 processes; nearest valid: 8"),
        (["replicate=3", "shard=4"], "mesh: found replicate 3 x shard 4, but 8 processes; nearest valid: replicate 2"),
        (["context=2"], (1, 8)),
        (["shard=2", "context=2"], (2, 4)),
        (["replicate=2", "context=4"], (2, 4)),
        (["shard=1", "context=2"], (4, 2)),
        (["context=3"], "mesh.context 3 must divide 8 processes; nearest valid: 2"),
        (["shard=8", "context=2"], "mesh.shard 8 must divide 4 processes; nearest valid: 4"),
        (["shard=1"], "mesh.shard 1 shards nothing; accepted: strategy ddp, or 2 and more"),
    ],
)
def test_one_number_makes_the_mesh(mesh: list[str], shape: tuple[int, int] | str):
    settings = ["train.processes=8", "train.batch_size=8", "train.strategy=fsdp2", *(f"train.mesh.{of}" for of in mesh)]
    if isinstance(shape, str):
        with pytest.raises(UserError, match=shape):
            validate(apply_overrides(MINI, settings))
    else:
        assert validate(apply_overrides(MINI, settings)).train.mesh_shape(8) == shape


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps", "--set 'train.steps': expected key=value, for example train.steps=100"),
        ("=3", "--set '=3': expected key=value, for example train.steps=100"),
        ("train.steps.more=3", "--set train.steps.more: no such setting; nearest: train.steps"),
        ("train.steps=[1", "--set train.steps: value '[1' is not valid YAML"),
        ("data.path=2024-13-45", "--set data.path: value '2024-13-45' is not valid YAML"),
    ],
)
def test_an_override_that_says_nothing_is_refused(override: str, said: str):
    with pytest.raises(UserError) as error:
        apply_overrides(MINI, [override])
    assert str(error.value) == said


def test_overrides_are_parsed_like_the_file_and_do_not_change_the_tree():
    before = copy.deepcopy(MINI)
    changes = ["train.steps=7", "train.optimizer.learning_rate=1e-3", "data.path=clips", "physics.num_layers=null"]
    changes += ["coupling.blocks=[1, 3]", "register.metric=score"]
    params = validate(apply_overrides(MINI, changes))
    assert before == MINI
    assert (params.train.steps, params.train.optimizer.learning_rate, params.data.path) == (7, 1e-3, "clips")
    assert (params.physics.num_layers, params.coupling.blocks) == (None, (1, 3))
    assert params.register_.metric == "score"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"train: [1\n", "line 2, column 1: not valid YAML: expected ',' or ']'"),
        (b"a: \xff\xfe\n", "not valid YAML: "),
        (b"a: 2024-13-45\n", "not valid YAML: month must be in 1..12"),
        (b"- 1\n", "found list, expected a mapping of preset, models, physics"),
        (b"", "found NoneType, expected a mapping of preset, models, physics"),
        (b"1: 2\n", "1: unknown setting"),
        (b"a: &a {b: *a}\n", "a: unknown setting; nearest: data"),
    ],
)
def test_a_file_without_valid_settings_is_reported_in_one_line(tmp_path: Path, content: bytes, said: str):
    file = tmp_path / "params.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_params(file)
    assert said in str(error.value) and str(error.value).startswith(f"{file}:") and "\n" not in str(error.value)


def test_a_missing_file_and_an_unknown_preset_are_user_errors(tmp_path: Path):
    with pytest.raises(UserError, match=r"absent\.yaml: no such file; `phantom preset mini` writes one"):
        load_params(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match=r"preset 'minni': no such preset; nearest: mini \(of mini, wan2"):
        preset_path("minni")


# --- fuzzing ---------------------------------------------------------------------------------------------------------

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=4)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = (
    st.sampled_from(["steps", "register_", "model_config", "trian", ""])
    | st.text(max_size=8)
    | st.integers()
    | st.none()
)


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """The mini preset with up to three settings replaced, removed, added or renamed."""
    tree = copy.deepcopy(MINI)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted(paths_of(tree), key=str)))
        parent = parent_of(tree, path)
        match draw(st.sampled_from(["replace", "remove", "add", "rename"])):
            case "replace":
                parent[path[-1]] = draw(VALUES)
            case "remove":
                del parent[path[-1]]
            case "add":
                parent[draw(KEYS)] = draw(VALUES)
            case "rename":
                parent[draw(KEYS)] = parent.pop(path[-1])
        if not tree:
            break
    return tree


@settings(max_examples=400, deadline=None, derandomize=True)
@given(mutated())
def test_any_mutation_is_valid_or_reported_in_one_line(tree: Any):
    try:
        params = validate(tree)
    except UserError as error:
        assert str(error).startswith("params: ") and len(str(error).splitlines()) == 1
    else:
        assert isinstance(params, Params)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(
        st.text(max_size=30) | st.builds("{}={}".format, st.sampled_from(all_keys()), st.text(max_size=12)), max_size=3
    )
)
def test_any_override_is_valid_or_reported_in_one_line(overrides: list[str]):
    try:
        validate(apply_overrides(MINI, overrides))
    except UserError as error:
        assert len(str(error).splitlines()) == 1


def paths_of(tree: dict[Any, Any], before: tuple[Any, ...] = (), leaves: bool = False) -> set[tuple[Any, ...]]:
    """The paths of all settings and, unless `leaves`, of all sections."""
    found: set[tuple[Any, ...]] = set()
    for key, value in tree.items():
        section = isinstance(value, dict)
        if not (section and leaves):
            found.add((*before, key))
        if section:
            found |= paths_of(value, (*before, key), leaves)
    return found


def parent_of(tree: dict[Any, Any], path: tuple[Any, ...]) -> dict[Any, Any]:
    for part in path[:-1]:
        tree = tree[part]
    return tree


def test_a_setting_that_has_its_default_in_code_is_not_in_what_identifies_a_result():
    """So that results from before there was the setting are found again; any other value is another result."""
    params, names = validate(MINI), ("models", "coupling", "train.steps")
    found = identity(params, names, without=())
    assert found["coupling"] == {k: v for k, v in MINI["coupling"].items() if k != "direction"}
    assert found["train"] == {"steps": MINI["train"]["steps"]}
    assert identity(params, ("coupling", "data.filter"), without=()).keys() == {"coupling"}
    one_way = validate(apply_overrides(MINI, ["coupling.direction=to_video"]))
    assert identity(one_way, names, without=())["coupling"]["direction"] == "to_video"
    stated = select(params, ("encode",), without=())["encode"]
    assert stated.pop("processes") == 1
    assert identity(one_way, ("encode",), without=()) == {"encode": stated}
