"""The training loop, for every objective and engine."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dpt_hpc.data.loader import Loader, Step
from dpt_hpc.data.sampler import Sampler
from dpt_hpc.errors import DptError
from dpt_hpc.models import EnergyModel
from dpt_hpc.stopwatch import part
from dpt_hpc.structure import Batch
from dpt_hpc.train.budget import EdgeBudget
from dpt_hpc.train.checkpoint import ModelCard, load_state, point, prune, save_checkpoint
from dpt_hpc.train.config import RunConfig
from dpt_hpc.train.costs import EpochCosts
from dpt_hpc.train.data import Data
from dpt_hpc.train.engine import Engine, TorchEngine
from dpt_hpc.train.monitor import Monitor
from dpt_hpc.train.objective import VALIDATION_EPOCH, Objective

Indices = NDArray[np.int64]


class DivergedError(DptError):
    """The loss or its gradient is not finite."""


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
        schedule = config.schedule
        self.schedule = ReduceLROnPlateau(
            engine.optimizer,
            factor=schedule.factor,
            patience=schedule.patience,
            threshold=schedule.threshold,
            min_lr=schedule.min_learning_rate,
        )
        decay = config.training.ema_decay
        self.average = AveragedModel(self.objective.model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None
        self.epoch = 1
        self.step_in_epoch = 0
        self.step = 0
        self.best_loss = math.inf
        self.epoch_sums: Counter[str] = Counter()
        self.epoch_seconds = 0.0
        self.costs = EpochCosts()
        self._seconds_before = 0.0
        self._started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds that the run has taken up to now, its earlier parts up to their last checkpoint included."""
        return self._seconds_before + time.monotonic() - self._started

    @property
    def total_steps(self) -> int:
        return self.config.training.epochs * self.sampler.steps_per_epoch

    @property
    def learning_rate(self) -> float:
        return float(self.engine.optimizer.param_groups[0]["lr"])

    def fit(self, monitor: Monitor) -> None:
        """Train to the last epoch, from wherever this trainer stands."""
        epochs = self.config.training.epochs
        self._tell_above_budget(monitor)
        if self.step == 0:
            monitor.epoch(0, epochs, 0, {"learning_rate": self.learning_rate, "validation": self.validate()})
        while self.epoch <= epochs:
            train = self.train_epoch(monitor)
            seconds = self.epoch_seconds
            validation = self.validate()
            if not math.isfinite(validation["loss"]):
                raise DivergedError(f"epoch {self.epoch}: the validation loss is {validation['loss']}.")
            self.schedule.step(train["loss"])
            improved = validation["loss"] < self.best_loss
            self.best_loss = min(self.best_loss, validation["loss"])
            record = {
                "learning_rate": self.learning_rate,
                "seconds": seconds,
                "train": train,
                "validation": validation,
                "structures_per_second": len(self.data.split.train) / seconds,
                "atoms_per_second": int(self.data.dataset.num_atoms[self.data.split.train].sum()) / seconds,
                **self.costs.record(seconds, self.engine.ranks),
            }
            monitor.epoch(self.epoch, epochs, self.step, record)
            self.epoch, self.step_in_epoch = self.epoch + 1, 0
            self.epoch_sums, self.epoch_seconds, self.costs = Counter(), 0.0, EpochCosts()
            self.save(monitor, best=improved)

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
                if every and self.step % every == 0 and self.step_in_epoch < self.sampler.steps_per_epoch:
                    self.save(monitor, best=False)
                    self.objective.train()
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
        sums_of_step = engine.ranks.sum(total)
        with part("update"):
            norm = engine.step()
        if not (math.isfinite(self.objective.loss_of(sums_of_step)) and math.isfinite(norm)):
            raise self._diverged(step.structures, self.objective.loss_of(sums_of_step), norm)
        if self.average is not None:
            self.average.update_parameters(self.objective.model)
        return sums_of_step, norm

    def _make_room(self, monitor: Monitor) -> None:
        """After a GPU ran out of memory in a step: forget what the step has computed, and halve the edge budget."""
        self.budget.halve(repeatable=isinstance(self.engine, TorchEngine))
        self.engine.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        monitor.warn(
            f"out of GPU memory at step {self.step + 1}: repeated with an edge budget of {self.sampler.edge_budget}"
        )

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
        return evaluate(self.evaluated(), self.engine, self.data, self.data.split.validation, self.config)

    def weights(self) -> dict[str, Tensor]:
        """What is exported."""
        return dict(self.evaluated().model.state_dict())

    def save(self, monitor: Monitor, *, best: bool) -> None:
        """Publish a checkpoint of this moment."""
        monitor.flush()
        state: dict[str, Any] = {
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "step": self.step,
            "best_loss": self.best_loss,
            "epoch_sums": dict(self.epoch_sums),
            "epoch_seconds": self.epoch_seconds,
            "costs": asdict(self.costs),
            "edge_budget": self.budget.state(),
            "seconds": self.elapsed,
            "schedule": self.schedule.state_dict(),
            "generator": torch.get_rng_state(),
            "world_size": self.engine.world_size,
        }
        if self.average is not None:
            state["average"] = self.average.state_dict()
            state["weights"] = self.objective.model.state_dict()
        checkpoint = save_checkpoint(self.run_dir, self.step, self.engine, self.card, self.weights(), state)
        if self.engine.rank == 0:
            # In this order: killed in between, the run resumes before this epoch and comes to the same best one.
            if best:
                point(self.run_dir, "best", checkpoint)
            point(self.run_dir, "last", checkpoint)
            prune(self.run_dir, self.config.checkpoint.keep)
        self.engine.ranks.barrier()

    def resume(self, checkpoint: Path, weights: dict[str, Tensor]) -> None:
        """Stand where `checkpoint` was saved."""
        state = load_state(checkpoint)
        if state["world_size"] != self.engine.world_size:
            raise DptError(
                f"checkpoint {checkpoint}: written by {state['world_size']} rank(s), this run has "
                f"{self.engine.world_size}.\nResume with {state['world_size']} rank(s)."
            )
        self.objective.model.load_state_dict(state.get("weights", weights))
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.engine.load(checkpoint)
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["generator"])
        self.epoch, self.step_in_epoch, self.step = state["epoch"], state["step_in_epoch"], state["step"]
        self.best_loss, self.epoch_sums = state["best_loss"], Counter(state["epoch_sums"])
        self.costs = EpochCosts(**state["costs"])
        self.budget.resume(state["edge_budget"])
        self.epoch_seconds, self._seconds_before = state["epoch_seconds"], state["seconds"]

    def _diverged(self, indices: Indices, loss: float, norm: float) -> DivergedError:
        ids = self.data.dataset.ids(indices)
        return DivergedError(
            f"epoch {self.epoch}, step {self.step + 1}: loss {loss:g}, gradient norm {norm:g}: not finite.\n"
            f"Structures of the step: {', '.join(ids)}\n"
            "Look at their labels with `dpt-hpc inspect`, lower optimizer.learning_rate, or filter at ingest."
        )


def zeros(objective: Objective) -> Counter[str]:
    """Sums to add to: every key on every rank, also on one that has no structure with some label."""
    return Counter(dict.fromkeys(objective.sum_names, 0.0))


def evaluate(objective: Objective, engine: Engine, data: Data, indices: Indices, config: RunConfig) -> dict[str, float]:
    """Loss and mean absolute errors over `indices`."""
    was_training = objective.training
    objective.eval()
    total = zeros(objective)
    counts = dict.fromkeys(objective.weights, 1.0)
    mine = indices[engine.rank :: engine.world_size]
    with torch.no_grad():
        for batch in data.batches(mine, config.training.evaluation_batch_size):
            with data.naming(batch):
                _, sums = objective(batch, VALIDATION_EPOCH, counts)
            total.update({k: float(v) for k, v in sums.items()})
    objective.train(was_training)
    return objective.metrics_of(engine.ranks.sum(total))


def collect_predictions(
    objective: Objective, engine: Engine, data: Data, indices: Indices, config: RunConfig
) -> dict[str, NDArray[Any]] | None:
    """Predicted and true values of every label over `indices`, in their order, on rank 0; None elsewhere.

    Keys: structure_ids, num_atoms (S,), atomic_numbers (A,), and <label>_true, <label>_pred of the rows that have
    the label, with <label>_structure: the position in `indices` of each row's structure.
    """
    objective.eval()
    # Contiguous shares keep the order when ranks are joined.
    mine = np.array_split(np.arange(len(indices)), engine.world_size)[engine.rank]
    parts: dict[str, list[NDArray[Any]]] = {}
    size = config.training.evaluation_batch_size
    with torch.no_grad():
        for start, batch in zip(range(0, len(mine), size), data.batches(indices[mine], size), strict=True):
            rows = mine[start : start + size]
            found: dict[str, Tensor] = {"atomic_numbers": batch.atomic_numbers}
            for label, (predicted, true, mask) in objective.predictions(batch, VALIDATION_EPOCH).items():
                structure = torch.as_tensor(rows, device=mask.device)
                if len(mask) != len(rows):
                    structure = structure.index_select(0, batch.batch)
                found[f"{label}_true"], found[f"{label}_pred"] = true[mask], predicted[mask]
                found[f"{label}_structure"] = structure[mask]
            for key, value in found.items():
                parts.setdefault(key, []).append(value.detach().cpu().numpy())
    gathered = engine.ranks.gather({k: np.concatenate(v) for k, v in parts.items()})
    if gathered is None:
        return None
    keys = {k for share in gathered for k in share}
    joined = {k: np.concatenate([share[k] for share in gathered if k in share]) for k in sorted(keys)}
    joined["structure_ids"] = np.array(data.dataset.ids(indices))
    joined["num_atoms"] = data.dataset.num_atoms[indices]
    return joined
