"""The train stage: the physics branch and the coupling learn beside the frozen video branch.

Read `Trainer.train_step` first. Randomness is a function of the sample's number in the run (`conditioning`), the order
of the data one of (seed, epoch) (`order`), the learning rate one of the step: a checkpoint needs no generator states,
and a resumed run repeats the unbroken one bit for bit on CPU.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from phantom.config import Params
from phantom.data.shards import LatentSet, refuse_other_recipe
from phantom.errors import Interrupted, StageFailed, UserError
from phantom.progress import say, track
from phantom.tracking import Tracker
from phantom.training import checkpoint, parallel
from phantom.training.conditioning import Batch, TrainingSet
from phantom.training.export import write_export
from phantom.training.gradient_norm import SplitGradients, total_norm
from phantom.training.objective import losses
from phantom.training.order import ShareOfBatches
from phantom.training.recursive_weight import RecursiveWeight
from phantom.training.setup import build_model, checkpointing_func, run_identity
from phantom.training.stop import stop_requests
from phantom.training.validation import Validation
from phantom.training.window import Window, is_of_this_machine, rounded

CHECKPOINT_LOSSES = ("loss", "loss_video", "loss_physics", "val_loss_video", "val_loss_physics")


@dataclass(frozen=True)
class TrainResult:
    """What the run of the physics branch came to; losses are those of the last log line."""

    steps: int
    loss: float
    loss_video: float
    loss_physics: float
    alpha: float
    resets: int
    out: str


def train(params: Params, root: Path = Path()) -> TrainResult:
    """Trains `models/phantom` and, with `train.control`, `models/control`: the same with alpha_z held at 0.

    Continues from the newest whole checkpoint of the same settings and data. Raises UserError; StageFailed after
    `train.max_bad_steps` bad losses in a row; Interrupted after SIGINT or SIGTERM, when everything is saved.
    """
    if params.train.strategy not in ("ddp", "fsdp2"):
        raise UserError(f"train.strategy: found {params.train.strategy!r}; this version trains with: ddp, fsdp2")
    if params.train.processes > 1 and not parallel.in_torchrun():
        parallel.launch(params, ["train"])
        return TrainResult(**json.loads((root / "models/phantom/result.json").read_text(encoding="utf-8")))
    result = Trainer(params, root, "phantom", held=False).run()
    if params.train.control:
        Trainer(params, root, "control", held=True).run()
    return result


class Trainer:
    """One run towards `models/<name>`."""

    def __init__(self, params: Params, root: Path, name: str, held: bool) -> None:
        self.params, self.settings, self.root, self.name = params, params.train, root, name
        latents = LatentSet(root / "data/latents", "train")
        refuse_other_recipe(latents.recipe, params)
        self.accelerator = parallel.join(self.settings.precision)
        self.device = self.accelerator.device
        self.latents = latents
        self.model = build_model(params, latents[0].physics.shape[0]).to(self.device).train()
        if self.settings.compile:
            self.model.compile_repeated_blocks(fullgraph=True)
        parallel.lay_out(self.model, self.settings.strategy)
        named = dict(self.model.trainable_parameters())
        self.names, self.parameters = list(named), list(named.values())
        optimizer = self.settings.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters, optimizer.learning_rate, betas=optimizer.betas, weight_decay=optimizer.weight_decay
        )
        self.average = [p.detach().clone() for p in self.parameters] if self.settings.ema_decay else None
        self.weight = RecursiveWeight(self.settings.recursive_weight, held)
        self.window = Window(self.device)
        self.norms: dict[str, float] = {}  # as last measured
        self.step, self.bad, self.history = 0, 0, list[dict[str, Any]]()
        self.checkpoints = root / "checkpoints" / f"{name}-{run_identity(params, latents.digest, held)}"
        run_id = self._resume()
        self.tracker = (
            Tracker(params, f"train {name}", run_id, {"stage": "train", "model": name}) if self.is_first else None
        )

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.accelerator.is_main_process

    # --- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        """Takes the steps that are left, and exports."""
        settings = self.settings
        start, status = self.step, "FAILED"
        share = settings.batch_size // settings.accumulation // settings.processes
        validation = (
            Validation(LatentSet(self.root / "data/latents", "heldout"), self.params, share)
            if settings.validate_every
            else None
        )
        batches = self._batches()
        try:
            with stop_requests() as stop, self._bar(start) as bar:
                while self.step < settings.steps:
                    began = time.monotonic()
                    figures = self.train_step([next(batches) for _ in range(settings.accumulation)])
                    figures["samples_per_second"] = settings.batch_size / (time.monotonic() - began)
                    last = self.step == settings.steps
                    if validation and (self.step % settings.validate_every == 0 or last):
                        figures |= validation(self.model, self.device)
                    if self.step % settings.log_every == 0 or last:
                        self._log(figures)
                    interrupted = parallel.any_process(stop.is_set, self.device)
                    if self.step % settings.checkpoint_every == 0 or last or interrupted:
                        self._save()
                    if bar:
                        bar.advance(note=", ".join(f"{k} {figures[k]:.3f}" for k in ("loss", "alpha")))
                    if interrupted and not last:
                        raise Interrupted(f"train: stopped after step {self.step}, which is saved; run again to go on")
            self._export()
            status = "FINISHED"
        except Interrupted:
            status = "KILLED"
            raise
        finally:
            if self.tracker:
                self.tracker.close(status)
        self.accelerator.wait_for_everyone()
        return self._result()

    def train_step(self, micro_batches: list[Batch]) -> dict[str, float]:
        """One step of L = L_v + alpha_z L_z over a global batch, this process's part of it. Returns its figures."""
        weight, size = self.weight, self.settings.batch_size
        split = SplitGradients(self.parameters) if weight.due(self.step) else None
        if (kind := self.settings.activation_checkpointing) != "none":
            self.model.enable_gradient_checkpointing(checkpointing_func(kind == "selective" and split is None))
        total = torch.zeros((), device=self.device)
        for batch in (b.to(self.device) for b in micro_batches):
            with self.accelerator.autocast():
                each = losses(self.model, batch)
            loss_v, loss_z = each.video.sum() / size, each.physics.sum() / size
            if split:
                split.backward(loss_v, loss_z)
            else:
                (loss_v + weight.alpha * loss_z).backward()
            self.window.add(batch.sigma.amax(dim=1), each)
            total += (loss_v + weight.alpha * loss_z).detach()

        if split:
            split.reduce(parallel.sum_over_processes)
            norm_v, norm_z = (float(n) for n in split.norms())
            weight.observe(norm_z)
            split.combine(weight.alpha)
            self.norms = {"grad_norm_video": norm_v, "grad_norm_physics": norm_z}
        else:
            parallel.sum_over_processes([p.grad for p in self.parameters])
        parallel.sum_over_processes([total])
        figures = {"loss": float(total), "alpha": weight.alpha, "resets": weight.resets, **self.norms}
        return figures | {"learning_rate": self._set_learning_rate(), "grad_norm": self._update()}

    def _update(self) -> float:
        """Clips and applies the gradients; a step whose gradient is not finite is skipped. Returns its norm."""
        norm = total_norm([p.grad for p in self.parameters])
        if torch.isfinite(norm):
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.settings.optimizer.clip_norm, norm)
            self.optimizer.step()
            self.weight.advance()
            self.bad = 0
            if self.average is not None:
                torch._foreach_lerp_(self.average, self.parameters, 1 - (self.settings.ema_decay or 0))
        else:
            self.bad += 1
            say(f"train: step {self.step + 1}: the gradient is not finite, the step is skipped")
            if self.bad >= self.settings.max_bad_steps:
                raise StageFailed(
                    f"train: {self.bad} steps in a row without a finite gradient; the last good state is kept in "
                    f"{self.checkpoints}; lower train.optimizer.learning_rate and run again"
                )
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return float(norm)

    def _set_learning_rate(self) -> float:
        """Warm-up, then constant or a cosine to zero: a function of the step alone."""
        settings, total = self.settings.optimizer, self.settings.steps
        rate = settings.learning_rate * min(1.0, (self.step + 1) / max(1, settings.warmup_steps))
        if settings.decay == "cosine":
            after = max(0, self.step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
            rate *= 0.5 * (1 + math.cos(math.pi * after))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    # --- around it ----------------------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[Batch]:
        settings = self.settings
        sampler = ShareOfBatches(
            self.latents.shapes,
            settings.batch_size,
            settings.seed,
            range(self.step, settings.steps),
            settings.accumulation,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        return iter(DataLoader(TrainingSet(self.latents, self.params), batch_sampler=sampler, collate_fn=Batch.of))

    @contextmanager
    def _bar(self, start: int) -> Iterator[Any]:
        if not self.is_first:
            yield None
            return
        with track(
            "train" if self.name == "phantom" else f"train {self.name}", self.settings.steps, "steps", start
        ) as bar:
            yield bar

    def _log(self, figures: dict[str, float]) -> None:
        """A record of the history and of MLflow: this step's figures, and the losses' means since the last record."""
        parallel.sum_over_processes([self.window.sums])
        figures = {**figures, **self.window.means()}
        self.window.clear()
        if self.tracker:
            learnt = {k: v for k, v in figures.items() if not is_of_this_machine(k)}
            self.history.append({"step": self.step, **rounded(learnt)})
            self.tracker.log(self.step, figures)

    def _save(self) -> None:
        """A checkpoint, written by the first process."""
        parallel.sum_over_processes([self.window.sums])
        if not self.is_first:
            self.window.clear()  # what it had seen is now the first one's
        moments = self.optimizer.state_dict()["state"]
        tensors = {
            "model": self._named(self.parameters),
            "optimizer": {
                f"{self.names[i]}/{k}": parallel.whole(v).cpu() for i, of in moments.items() for k, v in of.items()
            },
        }
        if self.average is not None:
            tensors["average"] = self._named(self.average)
        if self.tracker:
            state = {
                "weight": self.weight.state(),
                "window": self.window.state(),
                "history": self.history,
                "mlflow_run": self.tracker.run_id,
            }
            path = checkpoint.save(self.checkpoints, self.step, tensors, state, self.settings.keep_checkpoints)
            newest = self.history[-1] if self.history else {}
            self.tracker.checkpoint(self.step, path, {k: newest[k] for k in CHECKPOINT_LOSSES if newest.get(k)})
        self.accelerator.wait_for_everyone()

    def _resume(self) -> str | None:
        """Takes up the newest whole checkpoint, if there is one. Returns its MLflow run."""
        found = checkpoint.newest(self.checkpoints)
        if found is None:
            return None
        weights, moments = found.tensors("model"), found.tensors("optimizer")
        with torch.no_grad():
            for name, parameter in zip(self.names, self.parameters, strict=True):
                parameter.copy_(parallel.like(weights[name], parameter))
            if self.average is not None:
                averages = found.tensors("average")
                for name, average in zip(self.names, self.average, strict=True):
                    average.copy_(parallel.like(averages[name], average))
        state = self.optimizer.state_dict()
        state["state"] = {
            i: {"step": moments[f"{name}/step"]}
            | {k: parallel.like(moments[f"{name}/{k}"], self.parameters[i]) for k in ("exp_avg", "exp_avg_sq")}
            for i, name in enumerate(self.names)
            if f"{name}/step" in moments
        }
        self.optimizer.load_state_dict(state)
        self.weight.load(found.state["weight"])
        if self.is_first:
            self.window.load(found.state["window"])
        self.step, self.history = found.step, found.state["history"]
        if self.is_first and self.step < self.settings.steps:
            say(f"train {self.name}: continues after step {self.step} ({found.path})")
        return found.state["mlflow_run"]

    def _export(self) -> None:
        """Writes `models/<name>`, the moving average if there is one."""
        weights = self._named(self.average or self.parameters)
        if self.tracker:
            out, result = self.root / "models" / self.name, asdict(self._result())
            recipe, held = self.latents.recipe, self.weight.held
            write_export(out, self.model, weights, self.params, recipe, self.history, result, held)
            self.tracker.artifact(out / "history.json")

    def _named(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Whole, on the CPU, under the parameters' names. Every process must ask."""
        return {name: parallel.whole(t.detach()).cpu() for name, t in zip(self.names, tensors, strict=True)}

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
        )
