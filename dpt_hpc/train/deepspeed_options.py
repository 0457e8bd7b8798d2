"""What a user may tell DeepSpeed by a JSON file of its own, and the locks that a killed build of it leaves."""

from __future__ import annotations

import difflib
import json
import os
import time
from pathlib import Path
from typing import Any

from dpt_hpc.errors import ConfigError
from dpt_hpc.plain_text import from_json

ZERO_3 = (
    "stage 3 of ZeRO cannot train on forces: its hooks free a layer's weights after one backward pass, but the forces "
    "are a gradient inside the loss, whose own gradient needs the weights again; use stage 0, 1 or 2"
)

OURS = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.batch_size",
    "gradient_accumulation_steps": "training.grad_accumulation",
    "gradient_clipping": "training.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "fp16": "training.precision",
    "bf16": "training.precision",
    "amp": "training.precision",
}
"""Keys of DeepSpeed that an option of ours decides: two places for one number would sooner or later disagree."""

ALLOWED = (
    "zero_optimization", "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "wall_clock_breakdown", "memory_breakdown", "dump_state", "flops_profiler", "comms_logger",
)  # fmt: skip

SECONDS_OF_A_BUILD = 900.0
"""DeepSpeed's builds take minutes; an older lock has nobody behind it."""


def read_deepspeed_options(path: str | None, zero_stage: int) -> dict[str, Any]:
    """The content of a DeepSpeed JSON file with its ZeRO stage; of no file: the stage alone.

    zero_stage: engine.zero_stage, which the file may repeat, but not contradict, unless it is 0. Raises ConfigError.
    """
    if path is None:
        return {"zero_optimization": {"stage": zero_stage}}
    try:
        content = from_json(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"engine.deepspeed: {path} cannot be read: {error.strerror}.") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"engine.deepspeed: {path}:{error.lineno}: not valid JSON: {error.msg}.") from None
    except ValueError as error:
        raise ConfigError(f"engine.deepspeed: {path}: not valid JSON: {error}.") from None
    if not isinstance(content, dict) or not isinstance(content.get("zero_optimization", {}), dict):
        raise ConfigError(f"engine.deepspeed: {path}: expected an object, as in configs/deepspeed/zero1.json.")
    for key in content:
        if key in OURS:
            raise ConfigError(
                f"engine.deepspeed: {path}: {key} is decided by {OURS[key]}.\nTake it out of the file and set that."
            )
        if key not in ALLOWED:
            near = difflib.get_close_matches(key, ALLOWED, n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid here: {', '.join(ALLOWED)}."
            raise ConfigError(f"engine.deepspeed: {path}: {key}: unknown here; {hint}")
    zero = {"stage": zero_stage, **content.get("zero_optimization", {})}
    if zero["stage"] == 3:
        raise ConfigError(f"engine.deepspeed: {path}: {ZERO_3}.")
    if zero["stage"] not in (0, 1, 2):
        raise ConfigError(f"engine.deepspeed: {path}: ZeRO stage is {zero['stage']!r}, expected 0, 1 or 2.")
    if zero_stage not in (0, zero["stage"]):
        raise ConfigError(
            f"engine.deepspeed: {path} says ZeRO stage {zero['stage']}, but engine.zero_stage is {zero_stage}.\n"
            "Set one of the two."
        )
    if offload := next((key for key in zero if key.startswith("offload")), None):
        raise ConfigError(
            f"engine.deepspeed: {path}: zero_optimization.{offload}: nothing is offloaded here: the networks are small,"
            " and their optimiser runs where the weights are.\nTake it out of the file."
        )
    if zero.get("compute_grad_norm") is False:
        raise ConfigError(
            f"engine.deepspeed: {path}: zero_optimization.compute_grad_norm is false, but the gradient's norm tells a"
            " step that is not finite, which must be skipped.\nTake it out of the file."
        )
    if (dtype := content.get("communication_data_type", "fp32")) not in ("fp32", None):
        raise ConfigError(
            f"engine.deepspeed: {path}: communication_data_type is {dtype}, but gradients are summed in fp32: any"
            " number of ranks gives the same weights.\nTake it out of the file."
        )
    return {**content, "zero_optimization": zero}


def stale_build_locks() -> list[str]:
    """A warning for each lock that a killed build of a torch extension, such as DeepSpeed's, has left."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    folders = [Path(root)] if root else list((Path.home() / ".cache" / "torch_extensions").glob("*"))
    warnings = []
    for lock in sorted(lock for folder in folders for lock in folder.glob("*/lock")):
        try:
            age = time.time() - lock.stat().st_mtime
        except OSError:  # released just now
            continue
        if age > SECONDS_OF_A_BUILD:
            warnings.append(
                f"{lock}: left {age / 3600:.1f} h ago by a build of {lock.parent.name} that was killed. Any program"
                " that needs this extension waits for the lock for ever; dpt_hpc does not need it.\n"
                f"Remove it: rm {lock}"
            )
    return warnings
