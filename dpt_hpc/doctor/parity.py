"""Do these ranks compute what one rank computes? One step's gradient, both ways, on real structures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from dpt_hpc.doctor.finding import Finding, ok
from dpt_hpc.models import set_precision
from dpt_hpc.structure import Batch
from dpt_hpc.train.config import FinetuneConfig, PretrainConfig
from dpt_hpc.train.deepspeed_options import read_deepspeed_options
from dpt_hpc.train.engine import Engine, TorchEngine
from dpt_hpc.train.loop import Trainer
from dpt_hpc.train.objective import build_network
from dpt_hpc.train.ranks import Ranks

TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "tf32": 2e-2, "bf16": 5e-2}
"""Of the gradient's relative error. Sums in another order differ by 1e-6 in float32; wrong means are off by 1e-3 up."""


def gradient(engine: Engine, batches: Sequence[Batch], epoch: int) -> dict[str, Tensor]:
    """Of one step, whose micro-batches on this rank are `batches`; no weight changes. Collective."""
    own: Counter[str] = Counter()
    for batch in batches:
        own.update(engine.objective.counts(batch))
    counts = engine.ranks.sum(own)
    for i, batch in enumerate(batches):
        loss, _ = engine.loss(batch, epoch, counts)
        engine.backward(loss, last=i == len(batches) - 1)
    return engine.gradients()


def parity(trainer: Trainer, config: PretrainConfig | FinetuneConfig) -> Finding:
    """The relative error of the gradient of one step of all ranks, against the same structures on rank 0. Collective.

    It is the trainer's first step, which is then taken, so that its optimiser has a state to save.
    """
    engine, ranks = trainer.engine, trainer.engine.ranks
    trainer.objective.train()
    with trainer.load() as loader:
        steps = list(loader)
    step, mine = steps[0]
    weights = {name: value.detach().clone() for name, value in trainer.objective.model.state_dict().items()}
    found = gradient(engine, [batch.to(engine.device) for batch in mine], trainer.epoch)
    engine.step()
    stage = read_deepspeed_options(config.engine.deepspeed, config.engine.zero_stage)["zero_optimization"]["stage"]
    how = f"{type(engine).__name__}, ZeRO {stage}" if ranks.size > 1 else type(engine).__name__
    if ranks.rank:
        return ok("parity", "")
    dtype = weights["scale"].dtype
    model = build_network(config.model, config.objective).to(engine.device, dtype)
    if config.training.precision in ("bf16", "tf32"):
        set_precision(model, config.training.precision)
    model.load_state_dict(weights)
    objective = trainer.objective.around(model).train()
    single = TorchEngine(objective, Ranks(), engine.device, config.optimizer, None)
    target = getattr(config.objective, "target", None)
    whole = trainer.data.dataset.read(step.structures, dtype=dtype, target=target)
    expected = gradient(single, [whole.to(engine.device)], trainer.epoch)
    error = _norm([found[n] - expected[n] for n in expected]) / max(_norm(list(expected.values())), 1e-30)
    figures = {"relative_error": error, "structures": len(step.structures), "zero_stage": stage}
    whose = f"{how}: the gradient of {ranks.size} rank(s)"
    said = f"{whose} is that of one to {error:.1e} ({len(step.structures)} structures)"
    tolerance = TOLERANCE[config.training.precision]
    if not error < tolerance:  # also where it is not a number
        said = f"{whose} differs from that of one by {error:.1e}, allowed {tolerance:.0e}"
        todo = "Training would go wrong in silence. Compare with engine.zero_stage=0 and one node; look at `versions`."
        return Finding("parity", "bad", said, todo, figures)
    return ok("parity", said, **figures)


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.cat([t.detach().double().flatten().cpu() for t in tensors]).norm())
