"""What a run did and how it came out, in words and numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpt_hpc.report.accuracy import Accuracy, accuracy, values_of
from dpt_hpc.report.runs import FineTuning, Run
from dpt_hpc.report.wording import (
    ENERGY,
    FORCES,
    NO_BREAK,
    NOISE,
    STRESS,
    Quantity,
    count,
    duration,
    listing,
    mean_and_std,
    moment,
    quantity,
    target_quantity,
    weights_ratio,
)

NETWORKS = {"cgcnn": "CGCNN", "torchmd_et": "TorchMD-Net (ET)", "schnet": "SchNet", "painn": "PaiNN"}

IN_WORDS = {"energy_per_atom": "energy", "forces": "forces", "stress": "stress", "noise": "noise"}

QUANTITIES: Mapping[str, tuple[Quantity, ...]] = {
    "derivative_denoising": (NOISE,),
    "head_denoising": (NOISE,),
    "mixed": (ENERGY, FORCES, STRESS, NOISE),
}
"""What pre-trainings of a kind report; of any other kind: energy, forces and stress."""

DENOISING = {"derivative_denoising": "denoising by derivatives", "head_denoising": "denoising by a head"}


@dataclass(frozen=True)
class ErrorRow:
    """Mean absolute errors of one label over a run, in its error unit; None where unknown, nan where not a number.

    detail: of the part that was predicted, in the label's raw unit.
    """

    quantity: Quantity
    before: float | None
    best: float | None
    test: float | None
    detail: Accuracy | None


def quantities_of(run: Run) -> tuple[Quantity, ...]:
    """The labels that a run of its kind reports."""
    if run.kind == "property":
        return (target_quantity(target_of(run), unit_of(run)),)
    return QUANTITIES.get(run.kind, (ENERGY, FORCES, STRESS))


def target_of(run: Run) -> str:
    """The property that a fine-tuning learns."""
    return str(run.objective.get("target") or "property")


def unit_of(run: Run) -> str:
    """Unit of the target, from the run's summary or its dataset; "" if neither is at hand."""
    if run.results.get("unit"):
        return str(run.results["unit"])
    for source in run.sources:
        units = source.manifest.get("property_units")
        if isinstance(units, Mapping) and target_of(run) in units:
            return str(units[target_of(run)])
    return ""


def metric(record: Mapping[str, Any], part: str, name: str) -> float | None:
    """A number of a record: None if it is missing; nan for null, which is how the log writes what is not finite."""
    numbers = record.get(part)
    if not isinstance(numbers, Mapping) or name not in numbers:
        return None
    value = numbers[name]
    return float(value) if isinstance(value, (int, float)) else math.nan


def best_epoch(run: Run) -> Mapping[str, Any] | None:
    """The epoch record (1 or later) with the lowest validation loss."""
    scored = [(metric(r, "validation", "loss"), r) for r in run.epochs if r["epoch"] > 0]
    finite = [(loss, i, r) for i, (loss, r) in enumerate(scored) if loss is not None and math.isfinite(loss)]
    return min(finite)[2] if finite else None


def steps_per_epoch(run: Run) -> float:
    """Counted over the epochs so far; in the first one, what split and batch size will give; 0 if not known."""
    ends = [(int(r["step"]), int(r["epoch"])) for r in run.epochs if r["epoch"] > 0 and isinstance(r.get("step"), int)]
    if ends:
        return ends[-1][0] / ends[-1][1]
    training = run.config.get("training")
    batch = training.get("batch_size") if isinstance(training, dict) else None
    return float(math.ceil(run.split.get("train", 0) / batch)) if isinstance(batch, int) and batch > 0 else 0.0


def error_rows(run: Run) -> list[ErrorRow]:
    """Errors before training, at the best epoch, and on the test part, for each label that the run knows."""
    first = next((r for r in run.epochs if r["epoch"] == 0), {"validation": run.results.get("validation_before")})
    best = best_epoch(run)
    rows = []
    for q in quantities_of(run):
        before = metric(first, "validation", q.metric)
        after = metric(best or {}, "validation", q.metric)
        if after is None:
            after = metric(run.results, "validation", q.metric)
        if after is None:
            after = metric(run.results, "validation_after", q.metric)
        test = metric(run.results, "test", q.metric)
        values = values_of(run.predictions, q.label) if run.predictions else None
        detail = accuracy(values) if values is not None else None
        if test is None and detail is not None and run.predictions and run.predictions.part == "test":
            test = detail.mae
        if any(v is not None for v in (before, after, test)):
            before, after, test = (None if v is None else v * q.error_factor for v in (before, after, test))
            rows.append(ErrorRow(q, before, after, test, detail))
    return rows


def network_name(name: str) -> str:
    """A network as people write it."""
    return NETWORKS.get(name.lower(), name)


def dataset_name(run: Run) -> str:
    """The datasets' own names, joined."""
    names = [s.name for s in run.sources]
    if not names:
        data = run.config.get("data")
        paths = data.get("path") if isinstance(data, Mapping) else run.results.get("data")
        paths = [paths] if isinstance(paths, str) else paths
        names = [Path(str(p)).name for p in paths] if isinstance(paths, list) else []
    return " + ".join(names) or "an unnamed dataset"


def objective_name(run: Run) -> str:
    """What was learned."""
    scale = run.objective.get("noise_scale")
    noise = f" (noise of {scale:g}{NO_BREAK}Å)" if isinstance(scale, (int, float)) else ""
    if run.kind in DENOISING:
        return DENOISING[run.kind] + noise
    if run.kind == "property":
        return target_of(run).replace("_", " ")
    learned = [k for k in ("energy", "forces", "stress") if run.objective.get(f"{k}_weight", 1) != 0]
    weights = f" (loss weights {weights_ratio(run.objective)})" if run.objective else ""
    if run.kind == "mixed":
        datasets = listing([str(name) for name in run.objective.get("denoise_datasets") or []])
        also = f" and of {datasets}" if datasets else ""
        at_rest = run.objective.get("denoise_max_force")
        also += f" and of those without a force above {at_rest:g}{NO_BREAK}eV/Å" if at_rest else ""
        return f"{listing(learned)}{weights}, and denoising of structures without labels{also}{noise}"
    return listing(learned) + weights


def state_of(run: Run | FineTuning) -> str:
    """finished, or how far it is."""
    if run.finished:
        return "finished"
    if isinstance(run, FineTuning):
        done = sum(r.finished for r in run.runs)
        return f"{done} of {run.expected} seeds finished"
    total = f" of {run.total_epochs}" if run.total_epochs else ""
    return f"unfinished, epoch {run.last_epoch}{total}"


def subject(run: Run) -> str:
    """One sentence: which network, on what, how long."""
    if run.task == "evaluate":
        where = run.results.get("checkpoint")
        return f"Evaluation of {where or 'a checkpoint'} on {dataset_name(run)}."
    parameters = run.environment.get("parameters")
    size = f" with {count(parameters, 'parameter')}" if isinstance(parameters, int) else ""
    verb = {"pretrain": "pre-trained", "finetune": "trained"}.get(run.task, "trained")
    if run.kind in DENOISING:
        verb += " by"
    elif run.kind == "property":
        verb += " to predict"
    else:
        verb += " on"
    return f"{network_name(run.network)}{size} was {verb} {objective_name(run)}, {_material(run)}{_effort(run)}."


def _material(run: Run) -> str:
    total = sum(s.structures or 0 for s in run.sources) or sum(run.split.values())
    parts = [
        f"{run.split[part]:,} to {verb}"
        for part, verb in (("train", "train"), ("validation", "validate"), ("test", "test"))
        if part in run.split
    ]
    inside = f" ({', '.join(parts)})" if parts else ""
    return f"with {count(total, 'structure')} of {dataset_name(run)}{inside}" if total else f"on {dataset_name(run)}"


def _effort(run: Run) -> str:
    epochs = f", {count(run.last_epoch, 'epoch')}" if run.epochs else ""
    seconds = run.environment.get("wall_seconds")
    if seconds is None and run.epochs:
        seconds = sum(r["seconds"] for r in run.epochs if isinstance(r.get("seconds"), (int, float)))
    time = f" in {duration(seconds)}" if seconds else ""
    return f"{epochs}{time}{_machine(run)}" if epochs else ""


def _machine(run: Run) -> str:
    environment = run.environment
    processes = environment.get("world_size")
    ranks = f", {count(processes, 'process', 'processes')}" if isinstance(processes, int) and processes > 1 else ""
    if environment.get("gpu") and "cuda" in str(environment.get("device", "cuda")):
        return f" on {environment['gpu']}{ranks}"
    cores = environment.get("cores")
    return f" on {count(cores, 'core')}{ranks}" if isinstance(cores, int) else ranks


def outcome(run: Run) -> str:
    """One sentence: the errors, where they were measured, and what they were before."""
    rows = error_rows(run)
    for field, place in (("test", f"the {_size(run, 'test')}test structures"), ("best", "the validation structures")):
        found = [(r.quantity, getattr(r, field), r.before) for r in rows if getattr(r, field) is not None]
        if found:
            errors = listing([f"{quantity(v, q.error_unit)} in {_in_words(q)}" for q, v, _ in found])
            sentence = f"On {place} its mean absolute error is {errors}"
            if run.kind in ("derivatives", "mixed") and all(b is not None for *_, b in found):
                before = listing([quantity(b, q.error_unit) for q, _, b in found])
                sentence += f"; before training it was {before} on the validation structures"
            return sentence + "." + _progress(run)
    return "No epoch is complete yet." + _progress(run)


def _in_words(q: Quantity) -> str:
    return IN_WORDS.get(q.label) or q.name[:1].lower() + q.name[1:]


def _size(run: Run, part: str) -> str:
    return f"{run.split[part]:,} " if part in run.split else ""


def _progress(run: Run) -> str:
    if run.finished:
        return ""
    done = f"{run.last_epoch} of {count(run.total_epochs, 'epoch')}" if run.total_epochs else f"{run.last_epoch} epochs"
    last = f", the last record is of {moment(run.last_time)}" if run.last_time else ""
    seconds = [r["seconds"] for r in run.epochs if isinstance(r.get("seconds"), (int, float))]
    ahead = (run.total_epochs or 0) - run.last_epoch
    left = ahead * sum(seconds) / len(seconds) if seconds else 0
    rest = f"; about {duration(left if left < 120 else 60 * round(left / 60))} of training are left" if left > 0 else ""
    return f" The run has not finished: {done} are done{last}{rest}."


def seed_errors(tuning: FineTuning) -> dict[int, float]:
    """Test MAE of every finished seed, in the property's unit; nan where it is not finite."""
    found = {seed: metric(run.results, "test", "target_mae") for seed, run in tuning.seeds}
    errors = {seed: value for seed, value in found.items() if value is not None}
    noted, values = tuning.results.get("seeds"), tuning.results.get("test_mae")
    if not errors and isinstance(noted, list) and isinstance(values, list) and len(noted) == len(values):
        errors = {int(s): math.nan if v is None else float(v) for s, v in zip(noted, values, strict=True)}
    return errors


def tuning_sentences(tuning: FineTuning, unit: str, start: str) -> tuple[str, str]:
    """The subject and the outcome of a fine-tuning over its seeds; `start`: what it started from, in words."""
    first = tuning.runs[0]
    errors = seed_errors(tuning)
    what = f"{network_name(first.network)}, {start}, was trained to predict {objective_name(first)}"
    seeds = count(max(tuning.expected, len(tuning.seeds)), "seed")
    about = f"{what}, {_material(first)}, {seeds} of {count(first.total_epochs or first.last_epoch, 'epoch')}."
    if not errors:
        done = ", ".join(f"seed {seed}: {state_of(run)}" for seed, run in tuning.seeds)
        return about, f"No seed has finished yet ({done})."
    values = list(errors.values())
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else None
    text, deviation = mean_and_std(mean, spread)
    plus = f" ± {deviation}" if spread is not None else ""
    over = "mean ± standard deviation over" if spread is not None else "of"
    rest = "" if tuning.finished else f" So far, {state_of(tuning)}."
    return about, (
        f"Its mean absolute error on the test structures is {text}{plus} {unit}".rstrip()
        + f" ({over} {count(len(values), 'seed')}).{rest}"
    )
