"""Engines: who holds the optimiser and talks to the other ranks. The only door of DeepSpeed.

Both offer the same few calls; the loop does not know which one it drives. `backward` is given this rank's share of the
loss of the whole step (shares add up to the loss), so gradients are SUMMED over ranks and micro-batches.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from dpt_hpc.errors import ConfigError, EnvironmentFault
from dpt_hpc.ops import NATIVE_DEVICES
from dpt_hpc.stopwatch import count, measuring
from dpt_hpc.train.config import EngineOptions, OptimizerOptions
from dpt_hpc.train.deepspeed_options import read_deepspeed_options, stale_build_locks
from dpt_hpc.train.objective import Objective, Sums
from dpt_hpc.train.optimizer import MOMENTS, adamw, set_whole_state, whole_state
from dpt_hpc.train.placement import place
from dpt_hpc.train.ranks import Ranks, backends, measured_call
from dpt_hpc.train.world import World

SMALLEST_GRADIENT = 1024
"""Bytes: smaller collective calls of DeepSpeed are norms and flags."""


class Engine(ABC):
    """ranks, device and the wrapped objective; see the module docstring."""

    def __init__(self, objective: Objective, ranks: Ranks, device: torch.device) -> None:
        self.objective = objective
        self.ranks = ranks
        self.rank = ranks.rank
        self.world_size = ranks.size
        self.device = device

    @property
    @abstractmethod
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser whose learning rate the schedule sets."""

    @abstractmethod
    def loss(self, *arguments: Any) -> tuple[Tensor, Sums]:
        """The objective's forward, through whatever wraps it."""

    @abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of one micro-batch; `last` says that the step's micro-batches are complete."""

    @abstractmethod
    def step(self, *, skip: bool = False) -> float:
        """Clip, update, zero. Returns the gradient's norm before clipping, the same on every rank.

        Where `skip` is set, on all ranks, or that norm is not finite, weights and optimiser stay as they are.
        """

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """The whole gradient of the step by the names of the weights, between its last `backward` and `step`; zeros for
        a weight that the loss does not reach. Every rank calls it."""

    @abstractmethod
    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimiser's state, whole, whoever holds its parts; every rank calls it. Empty before the first update.

        "step" (): updates so far; "exp_avg.<name>", "exp_avg_sq.<name>": Adam's moments, by the model's names.
        """

    @abstractmethod
    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `optimizer_state` gave, under any engine, ZeRO stage and number of ranks."""

    def named_weights(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that are learnt, by the names of the exported weights."""
        return [(name, p) for name, p in self.objective.model.named_parameters() if p.requires_grad]


class TorchEngine(Engine):
    """One process, plain torch: no start-up, nothing to build."""

    def __init__(
        self,
        objective: Objective,
        ranks: Ranks,
        device: torch.device,
        options: OptimizerOptions,
        clip: float | None,
        scales: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        super().__init__(objective, ranks, device)
        self._optimizer = adamw(self.named_weights(), options, scales)
        self._clip = clip

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def loss(self, *arguments: Any) -> tuple[Tensor, Sums]:
        loss, sums = self.objective(*arguments)
        return loss, sums

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self, *, skip: bool = False) -> float:
        # A weight that the loss does not reach (the output's bias, where only forces are learnt) decays all the same:
        # DeepSpeed gives it a gradient of zero, and both engines must take the same steps.
        learnt = [parameter for _, parameter in self.named_weights()]
        for parameter in learnt:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = float(nn.utils.clip_grad_norm_(learnt, self._clip or float("inf")))
        if math.isfinite(norm) and not skip:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def gradients(self) -> dict[str, Tensor]:
        found = self.objective.model.named_parameters()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in found}

    def optimizer_state(self) -> dict[str, Tensor]:
        return whole_state(self._optimizer, self.named_weights())

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        set_whole_state(self._optimizer, self.named_weights(), state)


class DeepSpeedEngine(Engine):
    """Data-parallel ranks with ZeRO stage 0, 1 or 2."""

    def __init__(
        self,
        objective: Objective,
        ranks: Ranks,
        device: torch.device,
        options: OptimizerOptions,
        scales: Mapping[str, float],
        clip: float | None,
        deepspeed_options: dict[str, Any],
        grad_accumulation: int,
    ) -> None:
        super().__init__(objective, ranks, device)
        self._zero_stage = deepspeed_options["zero_optimization"]["stage"]
        deepspeed = _import_deepspeed(device, warn=ranks.node.rank == 0)
        self._fragments = deepspeed.utils
        os.environ.update(ranks.world.environment())  # also of a world of one
        if not torch.distributed.is_initialized():
            backend = backends() if device.type == "cuda" else "gloo"
            torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        # Adopts the group that is there.
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        _measure_calls(deepspeed.comm.comm.cdb)
        # The micro-batch size only satisfies DeepSpeed's arithmetic: our sampler forms the batches.
        # ZeRO wraps the optimiser, but shares its parameter groups: the schedule sets the learning rate here.
        self._optimizer = adamw(self.named_weights(), options, scales)
        self._engine, *_ = deepspeed.initialize(
            model=objective,
            optimizer=self._optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": grad_accumulation,
                "gradient_clipping": clip or 0.0,
                **deepspeed_options,
                "steps_per_print": 2**31,
                "zero_allow_untested_optimizer": True,
            },
        )

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def loss(self, *arguments: Any) -> tuple[Tensor, Sums]:
        loss, sums = self._engine(*arguments)
        return loss, sums

    def backward(self, loss: Tensor, last: bool) -> None:
        # DeepSpeed knows one number of micro-batches for the whole run, but the edge budget may need more in a step.
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over ranks; our shares are to be summed.
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)
        if not last:
            self._engine.step()  # counts the micro-batch; updates nothing before the accumulation boundary

    def step(self, *, skip: bool = False) -> float:
        if self._zero_stage:
            # ZeRO shards the gradient, knows its norm afterwards, and skips by itself a step whose norm is not finite.
            if skip:
                for gradients in self._engine.optimizer.averaged_gradients.values():
                    for gradient in gradients:
                        gradient.fill_(math.nan)
            self._engine.step()
            # A skipped step may leave the norm of the step before it.
            return float(self._engine.get_global_grad_norm()) if self._engine.was_step_applied() else math.inf
        # Stage 0 leaves the gradient whole, does not tell its norm, and would take any step.
        norm = float(nn.utils.get_total_norm([p.grad for p in self.objective.parameters() if p.grad is not None]))
        if math.isfinite(norm) and not skip:
            self._engine.step()
        else:
            self._engine.zero_grad()
            self._engine.micro_steps += 1  # as its step would: the accumulation boundary is counted by it
        return norm

    def gradients(self) -> dict[str, Tensor]:
        found = {
            name: (p, self._fragments.safe_get_full_grad(p)) for name, p in self.objective.model.named_parameters()
        }
        return {name: torch.zeros_like(p) if grad is None else grad.clone() for name, (p, grad) in found.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        if not self._zero_stage:
            return whole_state(self._optimizer, self.named_weights())
        state: dict[str, Tensor] = {}
        for flat in self._engine.optimizer.single_partition_of_fp32_groups:
            if "step" not in self._optimizer.state[flat]:
                return {}
            state["step"] = self._optimizer.state[flat]["step"]
        # By itself DeepSpeed links moments to parameters at the first step, before the second group's are made.
        self._engine.optimizer._hp_optimizer_states_linked = False
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.named_weights():
            for moment in MOMENTS:
                state[f"{moment}.{name}"] = self._fragments.safe_get_full_optimizer_state(parameter, moment)
        return state

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        if not self._zero_stage:
            set_whole_state(self._optimizer, self.named_weights(), state)
            return
        if not state:
            return
        zero = self._engine.optimizer
        for flat in zero.single_partition_of_fp32_groups:
            fresh = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            self._optimizer.state[flat] = {"step": state["step"].to(flat.device, copy=True), **fresh}
        zero._lazy_init_hp_params_optimizer_state()  # DeepSpeed's own link of moments to parameters, else at step 1
        for name, parameter in self.named_weights():
            for moment in MOMENTS:
                value = state[f"{moment}.{name}"].to(self.device)
                self._fragments.safe_set_full_optimizer_state(parameter, value, moment)


def build_engine(
    objective: Objective,
    ranks: Ranks,
    engine: EngineOptions,
    optimizer: OptimizerOptions,
    *,
    clip: float | None,
    grad_accumulation: int,
    scales: Mapping[str, float] = MappingProxyType({}),
) -> Engine:
    """The engine that `engine` asks for, with the objective on its device.

    scales: each weight's share of the learning rate, by its name; 1 where it is not named.
    """
    world = ranks.world
    if engine.world_size not in (None, world.world_size):
        raise ConfigError(
            f"engine.world_size is {engine.world_size}, but this run has {world.world_size} rank(s) ({world.source}).\n"
            "Start as many ranks as it says (was srun or mpirun forgotten?), or set it to null."
        )
    deepspeed_options = read_deepspeed_options(engine.deepspeed, engine.zero_stage)
    device = choose_device(engine, world)
    place(ranks, device, pin=engine.pin)
    objective.to(device)
    kind = engine.kind if engine.kind != "auto" else "torch" if world.world_size == 1 else "deepspeed"
    if kind == "torch":
        if world.world_size > 1:
            raise ConfigError(
                f"engine.kind is torch, which serves one process, but {world.source} started {world.world_size}.\n"
                "Set engine.kind=deepspeed (or auto)."
            )
        if engine.zero_stage and engine.kind == "torch":
            raise ConfigError(
                f"engine.zero_stage is {engine.zero_stage}, which needs DeepSpeed, but engine.kind is torch.\n"
                "Set engine.kind=deepspeed (or auto), or engine.zero_stage=0."
            )
        return TorchEngine(objective, ranks, device, optimizer, clip, scales)
    zero_stage = deepspeed_options["zero_optimization"]["stage"]
    if zero_stage and next(objective.parameters()).dtype == torch.float64:
        raise ConfigError(
            f"training.precision is float64, but DeepSpeed's ZeRO stage {zero_stage} keeps weights in float32.\n"
            "Set engine.zero_stage=0."
        )
    return DeepSpeedEngine(objective, ranks, device, optimizer, scales, clip, deepspeed_options, grad_accumulation)


def choose_device(options: EngineOptions, world: World) -> torch.device:
    """A GPU of this node where one is wanted, else the CPU; auto takes a GPU only if all native kernels run on it."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFault("engine.device is cuda, but torch sees no GPU here.\nUse engine.device=auto or cpu.")
    wanted = options.device == "cuda" or (options.device == "auto" and "cuda" in NATIVE_DEVICES)
    if not wanted or not torch.cuda.is_available():
        return torch.device("cpu")
    # A launcher may show each rank one GPU alone, whatever its local rank.
    index = world.local_rank % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _import_deepspeed(device: torch.device, *, warn: bool) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _quiet():
        try:
            import deepspeed
            import deepspeed.ops
            import deepspeed.utils
        except ImportError as error:
            raise EnvironmentFault(
                f"several ranks, and engine.kind=deepspeed, need DeepSpeed, which cannot be imported: {error}\n"
                "Install it with: pip install deepspeed"
            ) from error
    # DeepSpeed compiles deepspeed_shm_comm whenever it makes its backend on a CPU, and a kill meanwhile leaves a lock
    # on which every later run hangs. That op serves inference_all_reduce alone, which training never calls.
    for lock in stale_build_locks() if warn else []:
        print(f"warning: {lock}", file=sys.stderr)
    known = vars(deepspeed.ops).get("__compatible_ops__", {})
    deepspeed.ops.__compatible_ops__ = {**known, "deepspeed_shm_comm": False}
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # torch's word to DeepSpeed's authors, at every step of ZeRO 1 and 2.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    return deepspeed


def _measure_calls(backend: Any) -> None:
    """Let DeepSpeed's collective calls be told apart by a stopwatch: they happen inside its backward and its step."""
    if getattr(backend, "measured_by_dpt_hpc", False):
        return
    backend.measured_by_dpt_hpc = True
    for name in ("all_reduce", "reduce", "reduce_scatter_tensor", "all_gather_into_tensor"):
        setattr(backend, name, _measured(getattr(backend, name), halves=2 if name == "all_reduce" else 1))


def _measured(call: Callable[..., Any], halves: int) -> Callable[..., Any]:
    """halves: of an all-reduce, which is a reduce-scatter and an all-gather of the same bytes."""

    def measured(*arguments: Any, **options: Any) -> Any:
        if not measuring():
            return call(*arguments, **options)
        tensors = [a for a in (*arguments, *options.values()) if isinstance(a, Tensor)]
        size = max(t.numel() * t.element_size() for t in tensors)
        if size >= SMALLEST_GRADIENT:
            count("gradient_bytes", size * halves // 2)
            count("gradient_messages")
        else:
            count("sums")
        with measured_call():
            handle = call(*arguments, **options)
            if hasattr(handle, "wait"):  # its time belongs here, not to whoever happens to wait later
                handle.wait()
        return handle

    return measured


@contextmanager
def _quiet() -> Iterator[None]:
    """Warnings of DeepSpeed's own internals are not the user's to act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
