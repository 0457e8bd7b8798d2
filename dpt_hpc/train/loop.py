"""The training loop, for every objective and engine."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dpt_hpc.data.loader import Loader, Step
from dpt_hpc.data.sampler import Sampler
from dpt_hpc.models import EnergyModel
from dpt_hpc.stopwatch import part
from dpt_hpc.structure import Batch
from dpt_hpc.train import signals
from dpt_hpc.train.budget import EdgeBudget
from dpt_hpc.train.card import ModelCard
from dpt_hpc.train.checkpoint import Snapshot
from dpt_hpc.train.config import RunConfig
from dpt_hpc.train.costs import EpochCosts
from dpt_hpc.train.data import Data
from dpt_hpc.train.engine import Engine, TorchEngine
from dpt_hpc.train.failures import DivergedError, Divergence
from dpt_hpc.train.monitor import Monitor
from dpt_hpc.train.objective import Objective
from dpt_hpc.train.schedule import PlateauSchedule
from dpt_hpc.train.scoring import EdgeLimit, Scoring, evaluate, zeros
from dpt_hpc.train.signals import Interrupted
from dpt_hpc.train.writer import CheckpointWriter, Restored


class Trainer:
    """A run in progress: everything that a checkpoint must hold, and the steps that change it."""

    def __init__(
        self,
        engine: Engine,
        data: Data,
        config: RunConfig,
        seed: int,
        run_dir: Path,
        card: ModelCard,
        edges: NDArray[np.int64],
    ) -> None:
        self.engine, self.data, self.config, self.run_dir, self.card = engine, data, config, run_dir, card
        self.objective: Objective = engine.objective
        self.sampler = Sampler(
            data.split.train,
            edges,
            config.training.batch_size,
            seed,
            window=config.data.shuffle_window,
            similar_sizes=config.training.batching == "similar_sizes",
        )
        self.budget = EdgeBudget(config.training.edge_budget, self.sampler, engine.ranks, engine.device)
        self.schedule = PlateauSchedule(engine.optimizer, config.schedule, config.optimizer.learning_rate)
        decay = config.training.ema_decay
        self.average = AveragedModel(self.objective.model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None
        self.epoch = 1
        self.step_in_epoch = 0
        self.step = 0
        self.best_loss, self.best_epoch = math.inf, 0
        self.best_name: str | None = None
        self.divergence = Divergence(run_dir, engine.ranks, config.training.max_skipped_steps)
        self.writer = CheckpointWriter(run_dir, config.checkpoint)
        self.epoch_sums: Counter[str] = Counter()
        self.epoch_seconds = 0.0
        self.costs = EpochCosts()
        self._seconds_before = 0.0
        self._started = time.monotonic()
        self._saved_at: tuple[int, int] | None = None
        self._warned = False

    @property
    def elapsed(self) -> float:
        """Seconds that the run has taken up to now, its earlier parts up to their last checkpoint included."""
        return self._seconds_before + time.monotonic() - self._started

    @property
    def total_steps(self) -> int:
        return self.config.training.epochs * self.sampler.steps_per_epoch

    @property
    def learning_rate(self) -> float:
        return self.schedule.learning_rate

    @property
    def stops_early(self) -> bool:
        """Whether the validation loss has not become better for as many epochs as early stopping allows."""
        patience = self.config.training.early_stopping
        return patience is not None and self.epoch - 1 - self.best_epoch >= patience

    def fit(self, monitor: Monitor) -> None:
        """Train to the last epoch, from wherever this trainer stands.

        Raises Interrupted, with a checkpoint of this moment, once any rank has been told to stop; EnvironmentFault for
        a checkpoint that cannot be written; DivergedError.
        """
        signals.ready()
        try:
            self._fit(monitor)
        except Interrupted as stop:
            if self.step > 0 and self._saved_at != (self.epoch, self.step_in_epoch):
                self.save(monitor, best=False)
            self._finish_saving()
            for name in filter(None, self.engine.ranks.all_gather(signals.received())):
                signals.stop_too(name)  # a rank that no signal has reached ends with the others' exit code
            code = Interrupted(str(stop)).exit_code
            raise Interrupted(f"{stop}: all is saved up to step {self.step}.\n{signals.how_to_go_on(code)}") from None
        finally:
            self.writer.wait()  # whatever ends the run, the checkpoint in flight is not lost
        self._finish_saving()

    def _fit(self, monitor: Monitor) -> None:
        epochs = self.config.training.epochs
        self._tell_above_budget(monitor)
        if self.step == 0:
            monitor.epoch(0, epochs, 0, {"learning_rate": self.learning_rate, "validation": self.validate()})
        while self.epoch <= epochs and not self.stops_early:
            train = self.train_epoch(monitor)
            seconds = self.epoch_seconds
            validation = self.validate()
            if not math.isfinite(validation["loss"]):
                raise DivergedError(
                    f"epoch {self.epoch}: the validation loss is {validation['loss']}.\n"
                    "Look at the labels with `dpt-hpc inspect`, or lower optimizer.learning_rate."
                )
            if self.epoch_sums:
                self.schedule.step(train["loss"])
            else:  # a loss of 0 would be the best one for ever
                monitor.warn(f"epoch {self.epoch}: every step was skipped; the learning rate stays as it is.")
            improved = validation["loss"] < self.best_loss
            if improved:
                self.best_loss, self.best_epoch = validation["loss"], self.epoch
            record = {
                "learning_rate": self.learning_rate,
                "seconds": seconds,
                "train": train,
                "validation": validation,
                "structures_per_second": len(self.data.split.train) / seconds,
                "atoms_per_second": self.data.dataset.atoms_in(self.data.split.train) / seconds,
                "edges_per_second": int(self.sampler.edges[self.data.split.train].sum()) / seconds,
                **self.costs.record(seconds, self.engine.ranks, self.engine.device),
            }
            monitor.epoch(self.epoch, epochs, self.step, record)
            self.epoch, self.step_in_epoch = self.epoch + 1, 0
            self.epoch_sums, self.epoch_seconds, self.costs = Counter(), 0.0, EpochCosts()
            self.save(monitor, best=improved, validation=validation)
            if self.stops_early:
                monitor.say(f"no better validation loss since epoch {self.best_epoch}: stopped early")

    def train_epoch(self, monitor: Monitor) -> dict[str, float]:
        """The rest of the current epoch; its mean losses, also of the part before an interruption."""
        every = self.config.checkpoint.every_steps
        self.objective.train()
        started = time.monotonic()
        with closing(self.steps()) as steps:
            for step, batches in steps:
                try:
                    sums, norm = self.train_step(step, batches)
                except torch.OutOfMemoryError:
                    self._make_room(monitor)
                    continue
                asked_to_stop, unsaved = sums.pop("asked_to_stop"), sums.pop("unsaved")
                if self._is_finite(sums, norm):
                    self.epoch_sums.update(sums)
                self.costs.add(self.sampler.imbalance(step.parts))
                self.step_in_epoch, self.step = step.number + 1, self.step + 1
                seconds = time.monotonic() - started
                self.epoch_seconds += seconds
                record = {
                    "loss": self.objective.loss_of(sums),
                    "learning_rate": self.learning_rate,
                    "grad_norm": norm,
                    "structures_per_second": sums["structures"] / seconds,
                }
                monitor.step(self.epoch, self.step, record)
                if self.budget.steps_to_learn:
                    self.budget.learn(max(int(self.sampler.edges[share].sum()) for share in step.mine))
                    self._tell_above_budget(monitor)
                if unsaved:
                    self._tell_unsaved(monitor)
                else:
                    self._warned = False
                if every and self.step % every == 0 and self.step_in_epoch < self.sampler.steps_per_epoch:
                    self.save(monitor, best=False)
                    self.objective.train()
                if asked_to_stop:
                    raise Interrupted(f"told to stop ({signals.received() or 'another rank'})")
                started = time.monotonic()
        return self.objective.metrics_of(self.epoch_sums)

    def steps(self) -> Generator[tuple[Step, list[Batch]]]:
        """The rest of the current epoch; made anew from the step at hand when the edge budget has changed."""
        self.budget.watch()
        while self.step_in_epoch < self.sampler.steps_per_epoch:
            budget, waited = self.sampler.edge_budget, 0.0
            with self.load() as loader:
                for step, batches in loader:
                    self.costs.waited += loader.waited - waited
                    waited = loader.waited
                    yield step, batches
                    if self.sampler.edge_budget != budget:
                        break

    def load(self) -> Loader:
        """This rank's batches of the rest of the current epoch, made ahead of the steps."""
        epoch, first, engine = self.epoch, self.step_in_epoch, self.engine
        accumulation = self.config.training.grad_accumulation

        def plan(number: int) -> Step:
            return Step(number, self.sampler.parts(epoch, number, engine.world_size, accumulation), engine.rank)

        windows = (range(max(window.start, first), window.stop) for window in self.sampler.windows())
        return Loader(self.data.store, ([plan(number) for number in window] for window in windows if window))

    def train_step(self, step: Step, batches: Sequence[Batch]) -> tuple[dict[str, float], float]:
        """One optimiser step. Returns the sums of its errors over all ranks, and the gradient's norm.

        batches: this rank's, one for each micro-batch of `step`.
        """
        engine = self.engine
        mine = [batch.to(engine.device) for batch in batches]
        counts: Counter[str] = Counter()
        for batch in mine:
            counts.update(self.objective.counts(batch))
        step_counts = engine.ranks.sum(counts)
        total = zeros(self.objective)
        total["structures"] = sum(b.num_structures for b in mine)
        for i, batch in enumerate(mine):
            with self.data.naming(batch), part("forward"):
                loss, sums = engine.loss(batch, self.epoch, step_counts)
            total.update({k: float(v) for k, v in sums.items()})
            with part("backward"):
                engine.backward(loss, last=i == len(mine) - 1)
        # Every rank hears of a signal, or of rank 0's full disk, with the sums that it needs anyway.
        total["asked_to_stop"] = signals.received() is not None
        total["unsaved"] = engine.rank == 0 and self.writer.error is not None
        sums_of_step = engine.ranks.sum(total)
        with part("update"):
            norm = engine.step(skip=not math.isfinite(self.objective.loss_of(sums_of_step)))
        if not self._is_finite(sums_of_step, norm):
            self.divergence.skip(
                epoch=self.epoch,
                step=self.step + 1,
                loss=self.objective.loss_of(sums_of_step),
                grad_norm=norm,
                own_loss=self.objective.loss_of(total),
                structures=[i for batch in mine for i in self.data.dataset.ids(batch.structure_index.cpu().numpy())],
            )
        elif self.average is not None:
            self.average.update_parameters(self.objective.model)
        return sums_of_step, norm

    def _is_finite(self, sums: Mapping[str, float], norm: float) -> bool:
        return math.isfinite(self.objective.loss_of(sums)) and math.isfinite(norm)

    def _make_room(self, monitor: Monitor) -> None:
        """After a GPU ran out of memory in a step: forget what the step has computed, and halve the edge budget."""
        self.budget.halve(repeatable=isinstance(self.engine, TorchEngine))
        self.engine.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        monitor.warn(
            f"out of GPU memory at step {self.step + 1}: repeated with an edge budget of {self.sampler.edge_budget}"
        )
        self._tell_above_budget(monitor)

    def _tell_above_budget(self, monitor: Monitor) -> None:
        """Name the structures above the budget, once it is known."""
        if not self.budget.steps_to_learn and (warning := self.budget.above(self.data.dataset.ids)):
            monitor.warn(warning)

    def evaluated(self) -> Objective:
        """The objective around the weights that count: the averaged ones where EMA is on."""
        if self.average is None:
            return self.objective
        return self.objective.around(cast(EnergyModel, self.average.module))

    def validate(self) -> dict[str, float]:
        """Mean errors over the validation part, all ranks taking their share."""
        return evaluate(self.scoring, self.data.split.validation)

    @property
    def scoring(self) -> Scoring:
        """Evaluations of the weights that count. The edge budget as it is now holds for them too."""
        limit = EdgeLimit(self.sampler.edges, self.sampler.edge_budget)
        return Scoring(self.evaluated(), self.engine, self.data, self.config.training.evaluation_batch_size, limit)

    def weights(self) -> dict[str, Tensor]:
        """What is exported."""
        return dict(self.evaluated().model.state_dict())

    def save(self, monitor: Monitor, *, best: bool, validation: Mapping[str, float] | None = None) -> None:
        """Take a snapshot of this moment, and begin to publish it; every rank calls it.

        validation: the errors of just these weights, for the card.
        """
        monitor.flush()
        optimizer = self.engine.optimizer_state()
        self._saved_at = (self.epoch, self.step_in_epoch)
        if self.engine.rank:
            return
        name = self.writer.name(self.step)
        self.best_name = name if best else self.best_name
        state: dict[str, Any] = {
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "step": self.step,
            "skipped_steps": self.divergence.skipped,
            "best": self.best_name,
            "best_loss": self.best_loss,
            "best_epoch": self.best_epoch,
            "epoch_sums": dict(self.epoch_sums),
            "epoch_seconds": self.epoch_seconds,
            "costs": asdict(self.costs),
            "edge_budget": self.budget.state(),
            "seconds": self.elapsed,
            "learning_rate": self.learning_rate,
            "schedule": self.schedule.state_dict(),
            "generator": torch.get_rng_state(),
            "config": self.config.model_dump(mode="json"),
            "world_size": self.engine.world_size,
        }
        if self.average is not None:
            state["average"] = self.average.state_dict()
            state["weights"] = self.objective.model.state_dict()
        done = self.epoch - 1 if self.step_in_epoch == 0 else self.epoch
        training: dict[str, Any] = {
            "epoch": done,
            "epochs": self.config.training.epochs,
            "step": self.step,
            "seconds": self.elapsed,
        }
        if validation is not None:
            training["validation"] = dict(validation)
        card = replace(self.card, training=training)
        with part("checkpoint"):
            self.writer.submit(name, Snapshot.of(card, self.weights(), optimizer, state), best=best)

    def _tell_unsaved(self, monitor: Monitor) -> None:
        """The latest checkpoint could not be written: warn or stop, as configured; every rank calls it."""
        if self._warned:
            return
        fault = self.engine.ranks.broadcast(self.writer.fault())
        # None: written since rank 0 told of it.
        if fault is not None and self.config.checkpoint.on_error == "stop":
            raise fault
        if fault is not None:
            monitor.warn(f"{fault}\nTraining goes on; it is tried again at the next checkpoint.")
        self._warned = True

    def _finish_saving(self) -> None:
        """Until rank 0 has written all checkpoints; every rank calls it. Raises EnvironmentFault if it cannot."""
        fault = self.engine.ranks.broadcast(self.writer.finish() if self.engine.rank == 0 else None)
        if fault is not None:
            raise fault

    def resume(self, restored: Restored) -> None:
        """Stand where a checkpoint was saved, by any number of ranks. (The model already has its weights.)"""
        state = restored.state
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.engine.load_optimizer_state(restored.optimizer)
        self.schedule.load_state_dict(state["schedule"], state["learning_rate"])
        torch.set_rng_state(state["generator"])
        self.epoch, self.step_in_epoch, self.step = state["epoch"], state["step_in_epoch"], state["step"]
        self._saved_at = (self.epoch, self.step_in_epoch)
        self.best_name, self.best_loss = state["best"], state["best_loss"]
        self.best_epoch = state.get("best_epoch", 0)  # a checkpoint of a version without early stopping has none
        self.divergence.skipped = state["skipped_steps"]
        self.epoch_sums, self.costs = Counter(state["epoch_sums"]), EpochCosts(**state["costs"])
        self.budget.resume(state["edge_budget"])
        self.epoch_seconds, self._seconds_before = state["epoch_seconds"], state["seconds"]
