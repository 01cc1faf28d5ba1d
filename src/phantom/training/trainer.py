"""The train stage: trains the physics branch and the coupling next to the frozen video branch, or adapters on it.

Read `Trainer.train_step` first. Randomness is a function of the sample's number in the run (`conditioning`), the order
of the data a function of (seed, epoch) (`sampler`), the learning rate a function of the step: a checkpoint holds no
generator states, and on the CPU a resumed run repeats the uninterrupted one bit for bit.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from phantom import logs
from phantom.config import Params
from phantom.cost import processes_with_gpus
from phantom.data.storage import open_folder
from phantom.errors import Interrupted, StageFailed, UserError
from phantom.model import PhantomTransformer3DModel
from phantom.model.transformer import PhantomBlock
from phantom.planning.fit import check_fit
from phantom.progress import say, track
from phantom.tracking.runs import Tracker
from phantom.training import checkpoint, process_group
from phantom.training.activation_checkpointing import checkpointing_func, kept_blocks
from phantom.training.alignment import AlignmentLoss
from phantom.training.attention import pick_backend, using_backend
from phantom.training.build import build_model
from phantom.training.checkpoint_writer import CheckpointWriter
from phantom.training.compilation import compile_blocks
from phantom.training.conditioning import Batch, TrainingSet
from phantom.training.control import control_params
from phantom.training.data_loader import open_latents, read_batches
from phantom.training.export import HELDOUT, RESULT, export_metadata, write_export, write_json
from phantom.training.gradient_norm import HeadGradient
from phantom.training.initial_weights import load_initial_weights
from phantom.training.launch import in_torchrun, launch
from phantom.training.layout import distribute_unit, divide_tokens
from phantom.training.learner import Learner
from phantom.training.loss_window import LossWindow, rounded
from phantom.training.metrics import Metrics
from phantom.training.objective import Losses, PhysicsLoss, losses
from phantom.training.paired import gap
from phantom.training.profiler import StepProfiler
from phantom.training.recursive_weight import RecursiveWeight
from phantom.training.run_identity import run_identity
from phantom.training.sample_videos import SampleVideos
from phantom.training.sampler import DistributedBatchSampler
from phantom.training.signals import stop_on_signals
from phantom.training.throughput import Throughput
from phantom.training.validation import Validation, gap_figures
from phantom.training.verdict import verdict
from phantom.training.watchdog import Watchdog
from phantom.training.zero import ZeroLearner

CHECKPOINT_LOSSES = ("loss", "loss_video", "loss_physics", "val_loss_video", "val_loss_physics")


@dataclass(frozen=True)
class TrainResult:
    """The result of a run; losses are those of the last log line. verdict: what it learnt, in words (`verdict`)."""

    steps: int
    loss: float
    loss_video: float
    loss_physics: float
    alpha: float
    resets: int
    out: str
    verdict: str


def train(params: Params, root: Path = Path()) -> TrainResult:
    """Trains `models/phantom` and, with `train.control`, `models/control`: alpha_z held at 0, as many FLOPs.

    With `train.method` lora or alignment it trains `models/<method>` alone: adapters, from the same samples.
    Returns the result, whose verdict compares Phantom with the control. Resumes from the newest intact checkpoint of
    the same settings and data. Raises UserError; StageFailed after `train.max_bad_steps` steps in a row without a
    finite gradient; Interrupted after SIGINT or SIGTERM, once a checkpoint is written.
    """
    method, is_zero, start = params.train.method, params.train.strategy.startswith("zero"), params.train.init_from
    if params.train.trains_control and start and (root / start).resolve() == (root / "models" / method).resolve():
        raise UserError(
            f"train.init_from: {start}: replaced before the control starts from it; accepted: a copy of it, or "
            "train.control: false"
        )
    if (params.train.processes > 1 or is_zero) and not in_torchrun():
        with processes_with_gpus(params.train.processes if torch.cuda.is_available() else 0):
            launch(params, ["train"])
        return TrainResult(**json.loads((root / "models" / method / RESULT).read_text(encoding="utf-8")))
    trainer = Trainer(params, root, method, held=False)
    result, run_id, is_first, first = trainer.run(), trainer.run_id, trainer.is_first, trainer.latents[0]
    config = trainer.model.config
    del trainer  # and its memory
    if params.train.trains_control:
        Trainer(control_params(params, config, first), root, "control", held=True).run()
        if is_first and result.verdict:
            result = _compare_with_control(params, root, result, run_id)
    return result


def _compare_with_control(params: Params, root: Path, result: TrainResult, run_id: str | None) -> TrainResult:
    """Adds the gap to the control to the files of `models/phantom` and to its MLflow run, and to the verdict."""
    out = root / result.out
    heldout, control = (
        json.loads((path / HELDOUT).read_text(encoding="utf-8")) for path in (out, out.parent / "control")
    )
    if not control:  # it was trained without validation
        return result
    found = gap_figures("control", gap(control["clips"]["loss_video"], heldout["clips"]["loss_video"]))
    heldout["figures"] |= rounded(found)
    result = replace(result, verdict=verdict(heldout))
    write_json(out / HELDOUT, heldout)
    write_json(out / RESULT, asdict(result))
    if run_id:
        tracker = Tracker(params, "train phantom", run_id, root=root)
        tracker.log_summary(found)
        tracker.set_tag("verdict", result.verdict)
        tracker.close()
    return result


class Trainer:
    """Trains one model, `models/<name>`. `held`: alpha_z is held at 0 (the control, and where there is no L_z)."""

    def __init__(self, params: Params, root: Path, name: str, held: bool) -> None:
        self.params, self.settings, self.root, self.name = params, params.train, root, name
        self.accelerator = process_group.join(self.settings)
        self.metrics = Metrics(name, self.settings.steps)
        self.device = self.accelerator.device
        if self.settings.memory_check:
            check_fit(params, process_group.memory_of(self.device), root)
        self.latents = latents = open_latents(params, root, "train", self.device)
        if params.data.filter is not None and self.accelerator.is_main_process:
            say(f"train {name}: data.filter leaves {len(latents)} of {latents.unfiltered} training clips")
        if params.physics.force != "none" and not latents.forced:
            raise UserError(
                f"physics.force: found {params.physics.force}, but no force acts in any training clip; accepted: none, "
                "or clips with forces (data.worlds.forced above 0), prepared and encoded"
            )
        channels = latents[0].physics.shape[0]
        on_block = self._distribute if self.settings.strategy == "fsdp2" else None
        self.model = build_model(params, channels, latents.standardized_by, on_block).to(self.device).train()
        divide_tokens(self.model, self.settings, self.device.type)
        self.kept = kept_blocks(self.model, self.settings)  # by selective activation checkpointing
        if self.settings.compile:
            compile_blocks(self.model)
        dtype, head_dim = getattr(torch, self.settings.precision), self.model.config.video["attention_head_dim"]
        self.attention = pick_backend(self.settings, self.device, dtype, head_dim)
        half = self.settings.precision == "bfloat16" and self.settings.strategy != "fsdp2"  # which casts the weights
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=half)
        self.of_physics = PhysicsLoss.of(params)
        self.alignment = AlignmentLoss.of(params, latents.standardized_by)
        self.head = HeadGradient(self.model.physics_ends, self.of_physics, self.model.physics_split)
        self.twin_steps = self.settings.twin_steps if self.model.has_physics else 0
        self.weight = RecursiveWeight(self.settings.recursive_weight, held or not self.model.has_physics)
        terms = ("video", "physics", *(("alignment",) if self.alignment else ()))
        self.window = LossWindow(self.device, terms)
        self.throughput = Throughput(self.model, self.device, self.accelerator.num_processes)
        self.norms: dict[str, float] = {}  # as last measured
        self.step, self.history = 0, list[dict[str, Any]]()
        self.heldout: dict[str, Any] = {}  # figures of the last step, and losses by clip
        self.reads_are_free = self.device.type == "cpu"  # on a GPU, reading a tensor is a host sync
        self.saving: tuple[int, dict[str, float]] | None = None  # step and losses of the checkpoint being written
        self.stalled = False  # whether it was said that alpha_z does not grow
        self.bad = torch.zeros((), device=self.device, dtype=torch.int64)  # steps in a row that were skipped
        run = f"{name}-{run_identity(params, latents.digest, held)}"
        self.folder = root / "checkpoints" / run  # of the run's sample videos
        self.watchdog = Watchdog(name, self.folder / "hang")
        where = (params.storage.checkpoints or "checkpoints").rstrip("/")
        self.checkpoints = open_folder(f"{where}/{run}", root, params.storage)
        found = checkpoint.find_newest(self.checkpoints)
        if not found and self.settings.init_from:
            load_initial_weights(self.model, params, root)
        self.learner: Learner | ZeroLearner
        if self.settings.strategy.startswith("zero"):
            self.learner = ZeroLearner(self.model, self.settings, self.accelerator, found)
        else:
            self.learner = Learner(self.model, self.settings, self.device, found)
        run_id = self._resume(found) if found else None
        tags = {"stage": "train", "model": name, "attention_backend": self.attention}
        self.tracker = Tracker(params, f"train {name}", run_id, tags, root) if self.is_first else None
        self.profiler = StepProfiler(
            self.settings.profile if self.is_first else None,
            self.folder / "profile",
            self.device,
            lambda path: self.tracker.log_artifact(path, "profile") if self.tracker else None,
        )
        self.writer = CheckpointWriter(self.checkpoints, self.settings.keep_checkpoints, self.device)

    def _distribute(self, model: PhantomTransformer3DModel, block: PhantomBlock) -> None:
        """Shards a block before the next one is drawn: no process ever holds all trained weights."""
        shape, half = self.settings.mesh_shape(self.settings.processes), self.settings.precision == "bfloat16"
        distribute_unit(model, block.to(self.device), shape, half)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.accelerator.is_main_process

    @property
    def run_id(self) -> str | None:
        """The id of the MLflow run; None in other processes, and if the server could not be reached."""
        return self.tracker.run_id if self.tracker else None

    # --- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        """Runs the remaining steps and writes the export."""
        settings = self.settings
        start, status = self.step, "FAILED"
        share, validation, samples = settings.micro_batch, None, None
        if settings.validate_every or settings.sample_every:
            heldout = open_latents(self.params, self.root, "heldout", self.device)
            validation = Validation(heldout, self.latents, self.params, share) if settings.validate_every else None
            samples = SampleVideos(heldout, self.params, self.device) if settings.sample_every else None
        batches = self._batches()
        try:
            with using_backend(self.attention), stop_on_signals() as stop, self._bar(start) as bar:
                self.throughput.start()
                while self.step < settings.steps:
                    with self.throughput.waiting_for_data():
                        micro_batches = [next(batches) for _ in range(settings.accumulation)]
                    if self._takes_long(self.step + 1):
                        self.watchdog.be_patient()
                    with self.profiler.step(self.step + 1):
                        figures = self.train_step(micro_batches)
                    last, note = self.step == settings.steps, None
                    if validation and (self.step % settings.validate_every == 0 or last):
                        with self._aside(), self.autocast():
                            figures |= self._validate(validation, last)
                    if self.step % settings.log_every == 0 or last:
                        note = self._log(figures)
                    if samples and self.step % settings.sample_every == 0:
                        with self._aside():
                            self._write_samples(samples)
                    interrupted = process_group.any_process(stop.is_set or self.writer.has_failed)
                    self.watchdog.progress(self.step)
                    if self.step % settings.checkpoint_every == 0 or last or interrupted:
                        with self._aside():
                            self._save()
                    if bar:
                        bar.advance(note=note)
                    if interrupted and not last:
                        self._wait_for_checkpoint()
                        raise Interrupted(f"train: stopped after step {self.step}, which is saved; run again to go on")
            self._export()
            self._wait_for_checkpoint()
            status = "FINISHED"
        except Interrupted:
            status = "KILLED"
            raise
        finally:
            self.profiler.close()
            self.writer.close()
            self.metrics.close()
            if self.tracker:
                self.tracker.close(status)
        self.accelerator.wait_for_everyone()
        self.watchdog.close()
        logs.context["step"] = None  # of lines about this run alone
        return self._result()

    def train_step(self, micro_batches: list[Batch]) -> dict[str, Any]:
        """One optimizer step of L = L_v + alpha_z L_z, on this process's share of a global batch. Returns its metrics.

        Metrics that are tensors may still be computing: there is no host sync here, except where the norm is measured.
        """
        weight, learner, size = self.weight, self.learner, self.settings.batch_size
        twin_alone = self.step < self.twin_steps
        if self.step == self.twin_steps:
            self.window.clear()  # no mean is over steps with and without the video branch
        measured = weight.due(self.step) and not twin_alone
        alpha = weight.full if twin_alone else weight.alpha
        self._checkpoint_activations(learner.backwards if measured else 1)
        batches = [batch.to(self.device) for batch in micro_batches]
        if twin_alone:
            batches = [batch.uncoupled() for batch in batches]
        forward = partial(self._forward, batches, not twin_alone)
        if measured:
            seen = learner.measured_backward(forward, self._observe_norms)
        else:
            seen = learner.backward(forward, alpha)
            weight.watch(self._head_norm())

        total = torch.zeros((), device=self.device)
        for batch, each in zip(batches, seen, strict=True):
            self.window.add(batch.sigma.amax(dim=1), each)
            loss_v, loss_z = each.share(size)
            total += alpha * loss_z if twin_alone else loss_v + alpha * loss_z
        process_group.sum_over_samples([total], self.settings.mesh.context)
        rate = self._learning_rate()
        alpha = alpha if twin_alone else weight.alpha  # 0 after a reset at this very step
        figures = {"loss": total, "alpha": alpha, "resets": weight.resets, **self.norms, "learning_rate": rate}
        figures["grad_norm"] = norm = learner.update(rate, self.step)
        self.window.count_step(norm > self.settings.optimizer.clip_norm)
        self.bad = torch.where(torch.isfinite(norm), 0, self.bad + 1)
        self.throughput.count(batches[0], size, twin_alone and learner.skips_parts)
        if not twin_alone:
            weight.advance()
        self.step += 1
        logs.context["step"] = self.step
        self.metrics.progress(self.step)
        if measured or self.reads_are_free:
            self._stop_if_bad()
        return figures

    def _forward(self, batches: list[Batch], video: bool) -> Iterator[Losses]:
        """Yields the losses of each micro-batch, computed lazily. Accumulates the head's gradient on the way.

        video: False leaves the video branch and the coupling out, or L_v where the learner skips no part.
        """
        watches, runs_video = self.weight.watches_head, video or not self.learner.skips_parts
        with self.head.watching() if watches else nullcontext():
            for batch in batches:
                with self.autocast():
                    each = losses(
                        self.learner.model,
                        batch,
                        of_physics=self.of_physics,
                        video=runs_video,
                        alignment=self.alignment,
                    )
                if runs_video and not video:
                    each = each._replace(video=0 * each.video)  # a gradient of zeros, for which DeepSpeed waits
                if watches:
                    self.head.add(batch, self.settings.batch_size)
                self.watchdog.alive()
                yield each

    def _observe_norms(self, norms: dict[str, float]) -> float:
        """Passes measured norms to the schedule of alpha_z. Returns alpha_z, 0 after a reset."""
        ratio = self.weight.relative(norms["grad_norm_physics"])
        self.norms = {**norms, "grad_norm_physics_relative": ratio}
        self.weight.observe(norms["grad_norm_physics"], self._head_norm())
        if self.weight.is_stalled and self.tracker and not self.stalled:
            self.stalled = True
            say(
                f"train {self.name}: step {self.step}: alpha_z has been reset at every measurement for more than "
                f"{self.settings.recursive_weight.stalled_after} steps, so the physics loss has no weight; raise "
                f"train.recursive_weight.threshold (the norm is now {norms['grad_norm_physics']:.3g})",
                "warning",
            )
            self.tracker.set_tag("alpha_z", f"stalled at step {self.step}")
        return self.weight.alpha

    def _head_norm(self) -> float:
        """|dL_z/d(head)| of the physics branch's output head; 0 if the schedule does not watch it."""
        return self.head.norm(process_group.sum_over_processes) if self.weight.watches_head else 0.0

    def _checkpoint_activations(self, backwards: int) -> None:
        """Selective checkpointing supports a single backward pass; steps with two use full checkpointing."""
        if self.settings.activation_checkpointing != "none":
            self.model.enable_gradient_checkpointing(checkpointing_func(self.kept if backwards == 1 else ()))

    def _stop_if_bad(self) -> None:
        """Reads the number of consecutive skipped steps, a host sync. Raises StageFailed if there are too many."""
        bad = int(self.bad)
        self.metrics.show(bad_steps=bad)
        if bad:
            say(f"train: step {self.step}: the gradient is not finite, the step is skipped", "warning")
        if bad >= self.settings.max_bad_steps:
            raise StageFailed(
                f"train: {bad} steps in a row without a finite gradient; the last good state is kept in "
                f"{self.checkpoints}; lower train.optimizer.learning_rate and run again"
            )

    def _learning_rate(self) -> float:
        """Linear warm-up, then constant or cosine decay to zero: a function of the step alone.

        It begins again once the twin has been trained alone, since the coupling has not been trained then.
        """
        settings, twin = self.settings.optimizer, self.twin_steps
        step, total = (self.step, twin) if self.step < twin else (self.step - twin, self.settings.steps - twin)
        rate = settings.learning_rate * min(1.0, (step + 1) / max(1, settings.warmup_steps))
        if settings.decay == "cosine":
            after = max(0, step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
            rate *= 0.5 * (1 + math.cos(math.pi * after))
        return rate

    def _takes_long(self, step: int) -> bool:
        """Whether step number `step` takes longer than others: the whole model is compiled, or a trace is written."""
        compiles = self.settings.compile and step == self.twin_steps + 1
        return compiles or (self.settings.profile is not None and step == self.settings.profile[1])

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """A context for work that is not training: it is not in the throughput, and processes wait longer for it."""
        self.watchdog.be_patient()
        with self.throughput.excluded():
            yield

    # --- data, logs, checkpoints, export ------------------------------------------------------------------------------

    def _batches(self) -> Iterator[Batch]:
        settings = self.settings
        sampler = DistributedBatchSampler(
            self.latents.shapes,
            settings.batch_size,
            settings.seed,
            range(self.step, settings.steps),
            settings.accumulation,
            *process_group.data_place(settings.mesh.context),
        )
        return read_batches(TrainingSet(self.latents, self.params), sampler, self.params.storage.prefetch)

    @contextmanager
    def _bar(self, start: int) -> Iterator[Any]:
        if not self.is_first:
            yield None
            return
        with track(
            "train" if self.name == "phantom" else f"train {self.name}", self.settings.steps, "steps", start
        ) as bar:
            yield bar

    def _log(self, figures: dict[str, Any]) -> str:
        """Logs this step's metrics and the mean losses since the last log line, to history.json and MLflow.

        Returns the text to show beside the progress bar.
        """
        process_group.sum_over_samples([self.window.sums], self.settings.mesh.context)
        logged = {name: float(value) for name, value in figures.items()} | self.window.means()
        if self.step <= self.twin_steps:  # the video branch is not trained, or not even run
            logged = {name: value for name, value in logged.items() if not name.startswith("loss_video")}
        self.window.clear()
        self._stop_if_bad()
        speed = self.throughput.figures()
        self.throughput.start()
        self.metrics.show(**logged, **speed, alpha_stalled=self.weight.is_stalled)
        if self.tracker:
            self.history.append({"step": self.step, **rounded(logged)})
            self.tracker.log_metrics(self.step, logged | speed)
        shown = {"loss": logged["loss"], "alpha": logged["alpha"], "TFLOP/s": speed["tflops_per_second"]}
        shown |= {"MFU": speed["mfu"]} if "mfu" in speed else {}
        return ", ".join(f"{name} {value:.3f}" for name, value in shown.items())

    def _validate(self, validation: Validation, last: bool) -> dict[str, float]:
        """Held-out figures of the weights that are exported; at the end also those that take further passes."""
        model, figures = self.learner.model, dict[str, float]()
        if last and self.settings.ema_decay:
            figures = {f"{name}_raw": value for name, value in validation(model, self.device).items()}
        with self.learner.averaged():
            figures |= validation(model, self.device, last)
        if last:
            self.heldout = {"figures": rounded(figures), "clips": validation.by_clip} if figures else {}
        self.metrics.progress()
        return figures

    def _write_samples(self, samples: SampleVideos) -> None:
        """Writes sample videos next to the checkpoints and to MLflow."""
        with self.autocast(), self.learner.averaged():
            made = samples(self.learner.model)
        self.metrics.progress()
        if self.tracker:
            folder = f"samples/step-{self.step:07d}"
            for path in samples.write(made, self.folder / folder):
                self.tracker.log_artifact(path, folder)

    def _save(self) -> None:
        """Starts to save a checkpoint; training goes on once its tensors are copied."""
        began = time.monotonic()
        self._wait_for_checkpoint()
        process_group.sum_over_samples([self.window.sums], self.settings.mesh.context)
        if not self.is_first:
            self.window.clear()  # the first process now holds the total
        state = {
            "weight": self.weight.state(),
            "norms": self.norms,
            "window": self.window.state(),
            "history": self.history,
            "heldout": self.heldout,
            "mlflow_run": self.run_id,
            "config": self.model.export_config(
                metadata=export_metadata(self.params, self.latents.recipe, self.step, self.weight.held)
            ),
        }
        if self.tracker:
            self.tracker.flush()
        self.writer.save(self.step, self.learner.tensors(), state, self._heldout_loss())
        newest = self.history[-1] if self.history else {}
        self.saving = self.step, {k: newest[k] for k in CHECKPOINT_LOSSES if newest.get(k)}
        self.metrics.show(save_stall_seconds=time.monotonic() - began)
        self.metrics.progress()

    def _wait_for_checkpoint(self) -> None:
        """Waits until the checkpoint that is being written is committed, and logs it."""
        self.writer.wait()
        if self.saving and self.tracker:
            step, losses = self.saving
            self.tracker.log_checkpoint(step, f"{self.checkpoints}/{checkpoint.name_of(step)}", losses)
        self.saving = None

    def _heldout_loss(self) -> float:
        """L_v + L_z, if there is one, on held-out clips at the last validation; NaN before the first one."""
        names = ("val_loss_video", "val_loss_physics")
        found: dict[str, Any] = next((r for r in reversed(self.history) if names[0] in r), {names[0]: None})
        return sum(math.nan if found[name] is None else found[name] for name in names if name in found)

    def _resume(self, found: checkpoint.Checkpoint) -> str | None:
        """Restores the state of a checkpoint that is not tensors. Returns the id of its MLflow run."""
        self.weight.load(found.state["weight"])
        self.norms = found.state["norms"]
        if self.is_first:
            self.window.load(found.state["window"])
        self.step, self.history = found.step, found.state["history"]
        self.watchdog.step = self.step
        if self.step == self.settings.steps:
            self.heldout = found.state["heldout"]
        if self.is_first and self.step < self.settings.steps:
            say(f"train {self.name}: continues after step {self.step} ({found})")
        return found.state["mlflow_run"]

    def _export(self) -> None:
        """Writes `models/<name>`: the moving average of the weights if `train.ema_decay` is set."""
        weights = self.learner.weights()
        if self.tracker:
            out, result = self.root / "models" / self.name, asdict(self._result())
            recipe, held = self.latents.recipe, self.weight.held
            write_export(out, self.model, weights, self.params, recipe, self.history, result, self.heldout, held)
            self.tracker.log_artifact(out / "history.json")
            if self.heldout:
                self.tracker.set_tag("verdict", result["verdict"])
        for _ in weights:  # gathered from all processes, written by the first
            pass

    def _result(self) -> TrainResult:
        last: dict[str, Any] = next((r for r in reversed(self.history) if "loss" in r), {})
        return TrainResult(
            steps=self.step,
            loss=last.get("loss", math.nan),
            loss_video=last.get("loss_video", math.nan),
            loss_physics=last.get("loss_physics", math.nan),
            alpha=last.get("alpha", 0.0),
            resets=self.weight.resets,
            out=str(Path("models") / self.name),
            verdict=verdict(self.heldout) if self.heldout else "",
        )
