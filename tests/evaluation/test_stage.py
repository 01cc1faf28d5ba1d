"""The whole evaluate stage on tiny random models and two simulated worlds."""

import csv
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from phantom.data.manifest import MANIFEST, write_manifest
from phantom.data.sources.worlds_files import write_benchmark, write_clips
from phantom.data.video import read_frames
from phantom.errors import UserError
from phantom.evaluation import sample, stage
from phantom.evaluation.benchmarks import BENCHMARKS
from phantom.evaluation.interventions import ReplaceStates
from phantom.evaluation.physics_iq.conditions import find_condition, read_condition
from phantom.evaluation.physics_iq.evaluate import PARTS
from phantom.evaluation.physics_iq.requests import open_benchmark
from phantom.evaluation.sample_benchmark import sample_benchmark
from phantom.evaluation.sampling_spec import Settings
from phantom.evaluation.stage import evaluate
from phantom.evaluation.trivial import predictions
from phantom.evaluation.vbench2 import DIMENSIONS, check_folder, read_plan
from phantom.evaluation.vbench2_benchmark import VBENCH2
from phantom.model import LoraConfig, PhantomTransformer3DModel, PhysicsConfig
from phantom.model.export import video_config
from phantom.model.noise import sample_generator
from phantom.orchestration.run import score_rows
from phantom.tracking.records import log_stage
from phantom.tracking.registry import flatten_metrics
from tests import tiny
from tests.evaluation import judges
from tests.evaluation.toy import TOY

SMALL = (
    *("data.worlds.scenarios=2", "data.worlds.train_clips=2", "data.worlds.heldout_clips=1"),
    *("evaluate.sampling.steps=2", "evaluate.batch_size=2"),
)
MODELS = ("base", "control", "lora", "alignment", "phantom")


def save_export(folder, base, seed, coupling_std=0.2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        physics = PhysicsConfig(in_channels=tiny.PHYSICS_CHANNELS)
        model = PhantomTransformer3DModel.from_video_transformer(tiny.tiny_wan(), physics, base_id=str(base))
        with torch.no_grad():  # an untrained coupling leaves the video as the base's
            for name, parameter in model.trainable_parameters():
                if "coupling" in name:
                    parameter.normal_(std=coupling_std)
    model.save_export(
        folder,
        physics_encoder_id=str(base / "physics_encoder"),
        metadata={"max_prefix_frames": 9, "text_tokens": 16, "frames": 29, "height": 64, "width": 64, "fps": 4},
    )
    history = [{"step": 10 * i, "loss_video": 1 / (i + 1), "alpha": i / 10, "resets": float(i // 3)} for i in range(8)]
    (folder / "history.json").write_text(json.dumps([*history, {"step": 80, "loss_video": None}]))


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_base):
    root = tmp_path_factory.mktemp("run")
    save_export(root / "models/phantom", tiny_base, 0)
    save_export(root / "models/control", tiny_base, 1)
    return root


@pytest.fixture
def checkout(made, tmp_path):
    """A run's folder of its own, up to the models."""
    return shutil.copytree(made, tmp_path / "run")


@pytest.fixture
def params(make_params, checkout):
    params = make_params(*SMALL)
    write_worlds(checkout, params)
    return params


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(predictions, "DRAWS", 2)


def write_worlds(root, params):
    write_benchmark(root / "data/benchmark", params)
    (root / "data/clips").mkdir()
    write_manifest(root / "data/clips" / MANIFEST, write_clips(root / "data/clips", params)[0])


def videos(root):
    found = (path for name in MODELS for path in root.glob(f"checkpoints/evaluate/{name}-*/**/*.mp4"))
    return {path.relative_to(root): path.read_bytes() for path in sorted(found)}


def test_three_models_in_two_modes_are_scored_and_shown(params, checkout):
    result = evaluate(params, checkout)
    evaluation = json.loads((checkout / "reports/evaluation.json").read_text())
    assert list(evaluation["physics_iq"]) == ["single", "multi"]
    for mode, models in evaluation["physics_iq"].items():
        assert list(models) == ["base", "control", "phantom"]
        assert list(evaluation["worlds"][mode]) == ["base", "control", "phantom", "truth"]
        assert evaluation["worlds"][mode]["truth"]["position_error"] < 0.3
        for figures in models.values():
            assert 0 <= figures["score"] <= 100
            assert [row["scenario"] for row in figures["per_scenario"]] == ["fall-1", "projectile-1"]
    for mode, found in evaluation["trivial"].items():
        assert ("constant_velocity" in found) == (mode == "multi")
        best = max(figures["score"] for name, figures in found.items() if not name.startswith("simulator_"))
        assert found["last_frame"]["score"] < found["other_take"]["score"] == best
        assert found["simulator_state"]["worlds"]["position_error"] < 0.5
        assert found["other_take"]["worlds"]["position_error"] < 2 < found["last_frame"]["worlds"]["position_error"]
        phantom = evaluation["physics_iq"][mode]["phantom"]["score"]
        lead = found["other_take"]["phantom_gain"]["score"]["gain"]
        assert lead == pytest.approx(phantom - found["other_take"]["score"], abs=0.01)
        nearer = found["last_frame"]["phantom_gain"]["position_error"]["gain"]
        own = evaluation["worlds"][mode]["phantom"]["position_error"]
        assert nearer == pytest.approx(own - found["last_frame"]["worlds"]["position_error"])
        assert models["phantom"]["gain_over_control"]["scenarios"] == 2
        errors = [evaluation["worlds"][mode][name]["position_error"] for name in ("control", "phantom")]
        nearer = evaluation["worlds"][mode]["phantom"]["gain_over_control"]["position_error"]
        assert nearer["gain"] == pytest.approx(errors[1] - errors[0]) and nearer["low"] <= nearer["gain"]
    assert "its control in Physics-IQ (" in evaluation["verdict"] and "It is worst at the " in evaluation["verdict"]
    assert result.scores["single"]["phantom"] == evaluation["physics_iq"]["single"]["phantom"]["score"]

    # What others read of it: rows of equal columns, and the metric that decides on the champion.
    rows = score_rows(evaluation)
    assert len(rows) == 6 and len({tuple(row) for row in rows}) == 1
    assert set(rows[0]) == {"mode", "model", *PARTS, "verified"}
    flat = flatten_metrics(evaluation)
    assert "physics_iq.single.phantom.score" in flat and not any(
        "scenario" in name for name in flat if "worlds" in name
    )

    # 5 s after the condition, and the models differ though they start from the same noise.
    shown = videos(checkout)
    assert len(shown) == 3 * 2 * 2
    frames = {path: read_frames(checkout / path) for path in shown}
    assert {(video.shape, rate) for video, rate in frames.values()} == {((20, 64, 64, 3), 4.0)}
    assert len(set(shown.values())) == len(shown)

    page = (checkout / "reports/index.html").read_text()
    assert page.count("data:video/mp4;base64,") == 2 * (1 + 1 + 6) and page.count("data:image/png") == 2
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)", page)
    assert page.count('class="bar trivial"') == 6 + 7 and "Phantom ahead by" in page
    assert page.count("<i></i><span>Phantom − control</span></th>") == 2 and "against the control" in page
    assert page.count('<span class="mark"') == 2 * 3 * 3
    assert ">2 resets;" in page and 'download="evaluation.json"' in page and 'download="evaluation.csv"' in page
    assert page.count('<svg viewBox="0 0 560') == 2  # no gradient norms in this history


def test_interventions_on_z_change_the_videos_as_far_as_they_read_it(make_params, checkout, tiny_base):
    windows = ("data.frames=21", "evaluate.physics_iq.modes=[multi]")  # 9 frames give 12, and the last 9 the other 8
    params = make_params(*SMALL, *windows, "evaluate.interventions=[oracle, other, noise]")
    write_worlds(checkout, params)
    evaluate(params, checkout)
    evaluation = json.loads((checkout / "reports/evaluation.json").read_text())
    assert list(evaluation["physics_iq"]["multi"]) == ["base", "control", "phantom"]
    found = evaluation["interventions"]["multi"]
    assert list(found) == ["own", "oracle", "other", "noise"]
    assert found["own"]["position_error"] == evaluation["worlds"]["multi"]["phantom"]["position_error"]
    assert len(set(videos(checkout).values())) == 2 * (3 + 3)
    change = found["oracle"]["gain"]["position_error"]
    assert change["gain"] == pytest.approx(found["oracle"]["position_error"] - found["own"]["position_error"])
    assert change["low"] <= change["gain"] <= change["high"]
    page = (checkout / "reports/index.html").read_text()
    assert "Interventions on z" in page and "z of another recording" in page

    # A coupling that adds nothing: the same videos, whatever z is.
    save_export(checkout / "models/phantom", tiny_base, 0, coupling_std=0.0)
    shutil.rmtree(checkout / stage.WORK)
    evaluate(params, checkout)
    of_phantom = [data for path, data in videos(checkout).items() if "phantom" in path.parts[2]]
    assert len(of_phantom) == 2 * 4 and len(set(of_phantom)) == 2


def test_a_replaced_z_is_noised_to_the_level_of_the_next_step():
    pipe = SimpleNamespace(
        scheduler=SimpleNamespace(sigmas=torch.tensor([1.0, 0.5, 0.0])),
        transformer=SimpleNamespace(config=SimpleNamespace(physics={"noise_shift": 0.5})),
    )
    clean, noises = torch.ones(1, 2, 3, 1, 1), [torch.Generator().manual_seed(0)]
    replace = ReplaceStates(clean, noises)
    z = torch.zeros_like(clean)
    first, last = replace(pipe, 0, z), replace(pipe, 1, z)
    noise = torch.randn(2, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(first[0], 2 / 3 + noise / 3)  # sigma_z = r sigma / (1 + (r - 1) sigma) = 1/3
    assert torch.equal(last, clean)


def test_interrupted_work_goes_on_and_nothing_is_made_twice(params, checkout, monkeypatch):
    made, generate = [], sample.generate

    def counted(pipe, prompts, *arguments):
        if len(made) == 3:
            made.append("stopped")
            raise KeyboardInterrupt
        made.append(len(prompts))
        return generate(pipe, prompts, *arguments)

    monkeypatch.setattr(sample, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(params, checkout)
    assert len(videos(checkout)) == 6 and not (checkout / "reports").exists()
    lost = next(iter(videos(checkout)))
    before = videos(checkout)
    (checkout / lost).unlink()
    made.clear()
    made.extend([0, 0, 0, 0])
    evaluate(params, checkout)
    assert sum(made) == 2 * (3 + 1)  # three batches are new, and one is made again for the video that was lost
    after = videos(checkout)
    assert {path: after[path] for path in before} == before

    monkeypatch.setattr(sample, "load", None)  # all videos are there: no model is loaded
    page = (checkout / "reports/index.html").read_bytes()
    evaluate(params, checkout)
    assert (checkout / "reports/index.html").read_bytes() == page


def test_a_video_does_not_depend_on_what_it_is_batched_with(params, checkout):
    settings = Settings.for_physics_iq(params, "multi")
    root, rows = open_benchmark(checkout / "data/benchmark", "original")
    conditions = [read_condition(find_condition(root, row.name, settings), settings) for row in rows]
    pipe = sample.load(checkout / "models/phantom", params)
    prompts = [row.description for row in rows]

    def noises():
        return [sample_generator(settings.seed, row.name.id) for row in rows]

    together = sample.generate(pipe, prompts, conditions, noises(), settings)
    for number in (1, 0):
        only = slice(number, number + 1)
        alone = sample.generate(pipe, prompts[only], conditions[only], noises()[only], settings)
        assert np.abs(together[only].astype(int) - alone).max() <= 1
    assert np.abs(together[0].astype(int) - together[1]).mean() > 5


def test_without_a_control_there_are_two_models(params, checkout):
    shutil.rmtree(checkout / "models/control")
    (checkout / "models/control").mkdir()
    (checkout / "models/control/README.md").write_text("Trained with train.control: false.")
    evaluate(params, checkout)
    evaluation = json.loads((checkout / "reports/evaluation.json").read_text())
    assert list(evaluation["physics_iq"]["multi"]) == ["base", "phantom"]


def test_adapters_are_scored_beside_phantom(params, checkout, tiny_base):
    lora = LoraConfig(rank=4).resolve(video_config(tiny.tiny_wan()), 0)
    for seed, method in enumerate(("lora", "alignment")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = PhantomTransformer3DModel.with_adapters(tiny.tiny_wan(), lora, base_id=str(tiny_base))
            for name, parameter in model.trainable_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.3)
        model.save_export(checkout / "models" / method, metadata={"max_prefix_frames": 9, "text_tokens": 16})
    result = evaluate(params, checkout)
    evaluation = json.loads((checkout / "reports/evaluation.json").read_text())
    for models in evaluation["physics_iq"].values():
        assert list(models) == ["base", "control", "lora", "alignment", "phantom"]
        assert all(models["phantom"][f"gain_over_{method}"]["scenarios"] == 2 for method in ("lora", "alignment"))
    shown = videos(checkout)
    assert len(set(shown.values())) == len(shown) == 5 * 2 * 2
    assert set(result.scores["multi"]) == set(evaluation["physics_iq"]["multi"])
    page = (checkout / "reports/index.html").read_text()
    assert "five models from the same condition" in page
    for name, kind in (("LoRA", "lora"), ("Alignment", "alignment")):
        assert f">{name}<" in page and f'class="bar {kind}"' in page


def test_another_model_or_setting_is_sampled_anew_and_the_base_is_kept(params, make_params, checkout, tiny_base):
    only = make_params(*SMALL, "evaluate.physics_iq.modes=[single]")
    evaluate(only, checkout)
    before = videos(checkout)
    save_export(checkout / "models/phantom", tiny_base, 2)
    evaluate(only, checkout)
    new = videos(checkout).keys() - before.keys()
    assert {path.parts[2].split("-")[0] for path in new} == {"phantom"}
    evaluate(make_params(*SMALL, "evaluate.physics_iq.modes=[single]", "evaluate.seed=1"), checkout)
    assert len(videos(checkout)) == 6 + 2 + 6


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.physics_iq.prefix_frames=13", "too few for 13|accepted: at most 9"),
        ("evaluate.physics_iq.benchmark=nowhere", "nowhere: no split-videos/testing in it"),
        ("evaluate.physics_iq.descriptions=missing.csv", "missing.csv: no such file"),
    ],
)
def test_what_cannot_be_evaluated_is_told_in_one_line(params, make_params, checkout, override, message):
    with pytest.raises(UserError, match=message) as found:
        evaluate(make_params(*SMALL, override), checkout)
    assert "\n" not in str(found.value)


def test_a_missing_export_or_condition_is_named(params, checkout):
    switch = next((checkout / "data/benchmark/switch-frames").iterdir())
    switch.unlink()
    with pytest.raises(UserError, match=f"{switch.name}: no such file"):
        evaluate(params, checkout)
    (checkout / "models/phantom/config.json").unlink()
    with pytest.raises(UserError, match="models/phantom: no export there"):
        evaluate(params, checkout)


@pytest.fixture
def asked(checkout, tmp_path):
    """Settings of all benchmarks, with small judges."""
    rows = [{"caption": "A ball falls"}, {"caption": "Water <b>flows</b>"}]
    captions = judges.write_captions(tmp_path / "captions.csv", rows)
    info = [{"prompt_en": "A ball, again", "dimension": [dimension]} for dimension in DIMENSIONS if dimension[0] != "D"]
    (tmp_path / "info.json").write_text(json.dumps(info))
    places = {"videophy": "{input} {output} {weights}", "videophy2": "{input} {output} {task}"}
    settings = []
    for name, script in (("videophy", judges.VIDEOPHY), ("videophy2", judges.VIDEOPHY2)):
        (tmp_path / name).mkdir()
        command = judges.write_judge(tmp_path / name, script, places[name]).command
        settings += [f"evaluate.{name}.captions={captions}", f'evaluate.{name}.judge.command="{command}"']
    return [*settings, f"evaluate.vbench2.info={tmp_path / 'info.json'}", "data.frames=5", "data.min_frames=5"]


def test_benchmarks_of_prompts_are_sampled_judged_and_shown(make_params, checkout, asked):
    params = make_params(*SMALL, *asked, "evaluate.benchmarks=[videophy, videophy2]", "evaluate.videophy.samples=2")
    result = evaluate(params, checkout)
    evaluation = json.loads((checkout / "reports/evaluation.json").read_text())
    assert list(evaluation)[-2:] == ["videophy", "videophy2"] == list(result.scores)
    assert list(evaluation["videophy"]) == ["base", "control", "phantom"]
    assert evaluation["videophy"]["phantom"]["gain"].keys() >= {"gain", "low", "high", "paired"}
    assert evaluation["videophy"]["phantom"]["gain"]["paired"] == 1
    assert "videophy2.phantom.joint_4" in flatten_metrics(evaluation)
    assert not any("prompt" in name and not name.endswith("prompts") for name in flatten_metrics(evaluation))

    shown = videos(checkout)
    assert len(shown) == 3 * (2 * 2 + 2)
    names = {path.name for path in shown if path.parts[-2] == "videophy"}
    assert names == {"0001-0.mp4", "0001-1.mp4", "0002-0.mp4", "0002-1.mp4"}
    frames, rate = read_frames(checkout / next(iter(shown)))
    assert frames.shape == (5, 64, 64, 3) and rate == 4
    assert len(set(shown.values())) == 3 * 4  # the same captions and seeds are the same videos
    page = (checkout / "reports/index.html").read_text()
    assert "VideoPhy-2" in page and "Paper: Phantom" in page and "<b>flows" not in page


def test_mlflow_has_the_figures_and_videos_of_every_benchmark(make_params, checkout, asked, tmp_path):
    import mlflow

    store = f"sqlite:///{tmp_path}/mlflow.db"
    params = make_params(
        *SMALL,
        *asked,
        "evaluate.benchmarks=[physics-iq, videophy]",
        "evaluate.physics_iq.modes=[single]",
        f"tracking.uri={store}",
        f"tracking.artifacts={tmp_path}/artifacts",
    )
    write_worlds(checkout, params)
    log_stage("evaluate", params, evaluate(params, checkout), checkout)
    client = mlflow.MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name(params.tracking.experiment).experiment_id])
    figures = flatten_metrics(json.loads((checkout / "reports/evaluation.json").read_text()))
    assert run.data.metrics == figures and run.info.status == "FINISHED"
    wanted = {"physics_iq.single.phantom.score", "worlds.single.base.missing", "videophy.phantom.pc_mean"}
    assert wanted <= figures.keys()
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        "evaluation.json",
        "index.html",
        "samples",
    }
    kept = {file.path for file in client.list_artifacts(run.info.run_id, "samples")}
    assert kept == {"samples/single", "samples/videophy"}


def test_without_a_judge_the_inputs_of_all_models_are_written_and_the_message_goes_on(make_params, checkout, asked):
    none = [setting for setting in asked if "command" not in setting]
    params = make_params(*SMALL, *none, "evaluate.benchmarks=[videophy]")
    with pytest.raises(UserError, match=r"sa\.csv and pc\.csv beside its input; so also for 2 other models") as error:
        evaluate(params, checkout)
    assert "\n" not in str(error.value)
    inputs = sorted((checkout / stage.WORK).glob("videophy-*/sa_testing.csv"))
    assert len(inputs) == 3 and not (checkout / "reports").exists()
    for table in inputs:  # what a judge elsewhere has made of them
        for task, name in (("sa", "sa_testing.csv"), ("pc", "physics_testing.csv")):
            rows = list(csv.reader((table.parent / name).open(newline="")))[1:]
            with (table.parent / f"{task}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([*row, 0.5] for row in rows)
    assert evaluate(params, checkout).scores == {"videophy": {"base": 50, "control": 50, "phantom": 50}}


def test_videos_that_several_dimensions_ask_for_are_made_once(make_params, asked, tiny_base, tmp_path, monkeypatch):
    made, generate = [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda *a: made.append(len(a[1])) or generate(*a))
    params = make_params(*SMALL, *asked)
    chosen = ["Mechanics", "Material"]
    result = sample_benchmark(VBENCH2, params, tiny_base, tmp_path / "out", options={"dimension": chosen})
    assert (result.videos, result.frames, sum(made)) == (6, 5, 3)
    assert set(check_folder(tmp_path / "out", read_plan(tmp_path / "info.json", chosen))) == set(chosen)
    first, second = (sorted((tmp_path / "out" / dimension).iterdir()) for dimension in chosen)
    assert [path.name for path in first] == [f"A ball, again-{index}.mp4" for index in range(3)]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert len({path.read_bytes() for path in first}) == 3
    second[1].unlink()
    sample_benchmark(VBENCH2, params, tiny_base, tmp_path / "out", options={"dimension": chosen})
    assert second[1].read_bytes() == first[1].read_bytes() and sum(made) == 3

    for dimension in chosen:  # of longer prompts, each of its own, six are made and called by the short one
        (tmp_path / f"{dimension}.txt").write_text(f"A red ball falls and springs back, to show {dimension}.")
    params = make_params(*SMALL, *asked, f"evaluate.vbench2.prompts={tmp_path}")
    sample_benchmark(VBENCH2, params, tiny_base, tmp_path / "longer", options={"dimension": chosen})
    first_longer, second_longer = (sorted((tmp_path / "longer" / dimension).iterdir()) for dimension in chosen)
    assert [path.name for path in first_longer] == [path.name for path in first] and sum(made) == 9
    assert len({path.read_bytes() for path in (*first, *first_longer, *second_longer)}) == 9


@pytest.mark.parametrize(
    ("benchmark", "message"),
    [("videophy", "evaluate.videophy.captions: null"), ("vbench2", "evaluate.vbench2.info: null")],
)
def test_a_benchmark_without_prompts_is_told_before_anything_is_made(make_params, checkout, benchmark, message):
    with pytest.raises(UserError, match=message):
        evaluate(make_params(*SMALL, f"evaluate.benchmarks=[{benchmark}]"), checkout)
    assert not videos(checkout)


def test_a_new_benchmark_is_evaluated(make_params, checkout, monkeypatch):
    monkeypatch.setitem(BENCHMARKS, TOY.name, TOY)
    params = make_params(*SMALL, "evaluate.benchmarks=[brightness]", "data.frames=5", "data.min_frames=5")
    result = evaluate(params, checkout)
    evaluation = json.loads((checkout / "reports/evaluation.json").read_text())
    assert list(result.scores["brightness"]) == ["base", "control", "phantom"] == list(evaluation["brightness"])
    assert evaluation["brightness"]["phantom"]["gain_over_control"]["prompts"] == 3
    assert evaluation["verdict"].startswith("Phantom is not distinguishable from its control in Brightness (")
    assert "brightness.phantom.darkest" in flatten_metrics(evaluation)
    assert "Darkest, %" in (checkout / "reports/index.html").read_text()
