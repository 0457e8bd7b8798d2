"""The options of a run, as pydantic models. `config_file` reads them from YAML."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from dpt_hpc.network_options import CGCNNOptions, ModelOptions
from dpt_hpc.train.compat import Compat, check_preset, filled
from dpt_hpc.train.deepspeed_options import ZERO_3


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class SplitOptions(Options):
    train: float = Field(0.8, gt=0, le=1)
    validation: float = Field(0.05, gt=0, lt=1)
    test: float = Field(0.15, ge=0, lt=1)
    by: Literal["group", "structure"] = "group"
    """group keeps all structures of one material in one part; structure is the paper's random split."""
    seed: int | None = None
    """null: the seed of the run."""
    train_fraction: float = Field(1.0, gt=0, le=1)
    """How much of the training part is learnt from; the other parts stay. Of the same seed a smaller part lies within a
    larger one, and with by=group no material is parted: for studies of the amount of data."""
    matbench: str | None = None
    """A file of Matbench's official folds: the seeds 0 to 4 are then its folds, each of which tests its own fifth. The
    rest is parted into training and validation by the seed, in the ratio of the two."""
    matbench_task: str | None = None
    """Which of the file's tasks, such as matbench_jdft2d; null: the only one with as many structures as the dataset."""

    @model_validator(mode="after")
    def _sums_to_one(self) -> SplitOptions:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-9:
            raise ValueError(f"train + validation + test is {total:g}, expected 1")
        return self


class DataOptions(Options):
    path: tuple[str, ...] = Field(min_length=1)
    """Directories written by `dpt-hpc ingest`; one or several."""
    split: SplitOptions = SplitOptions()
    store: Literal["auto", "disk", "node", "cluster"] = "auto"
    """Where structures are kept between steps; all give the same batches. disk: nowhere, read a window ahead; memory
    does not grow with the dataset. node: one copy in the memory of each node. cluster: one copy over the memory of all
    nodes, needs MPI. auto: node if the dataset fits, else cluster if it fits there and MPI is at hand, else disk.
    disk is for few ranks: a window is divided among all of them, so that one rank reads 86 structures at a time, each
    of 16 ranks 4.4, of 64 ranks 1.6, of 256 ranks 1.1 (13 atoms a structure, the default window): with many, use
    cluster, or stage the shards on the nodes' own disks."""
    memory: float = Field(0.5, gt=0)
    """What auto may take of a node's memory: up to 1, a part of what is free; above, GB."""
    stage: str | None = None
    """A directory on the node's own disk, such as ${TMPDIR}, to which the shards are copied first, and checked."""
    exclude: tuple[str, ...] | None = None
    """A file of `dpt-hpc data leaks --out`, or a JSON list of ids, or several: structures that are taken out of the
    parts of the split. The others stay in theirs."""
    shuffle_window: int = Field(65_536, ge=1)
    """How many structures are shuffled among themselves. A larger dataset is drawn in windows of that many, made of
    blocks of 64 neighbours in random order, so that a step needs one window in reach and not the dataset."""

    @field_validator("path", "exclude", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class LabelOptions(Options):
    """Energy, forces and stress (method.md, "Losses"): weighted mean absolute errors over all components."""

    kind: str
    energy_weight: float = Field(1.0, ge=0)
    forces_weight: float = Field(500.0, ge=0)
    stress_weight: float = Field(500.0, ge=0)
    element_references: bool = False
    """Learn the energy relative to per-element references, fitted by least squares on the training split."""
    normalise: bool = False
    """Scale the network's output by the spread of the training energies per atom (after references)."""

    @model_validator(mode="after")
    def _learns_something(self) -> LabelOptions:
        if self.energy_weight == self.forces_weight == self.stress_weight == 0:
            raise ValueError("energy_weight, forces_weight and stress_weight are all 0: there is nothing to learn")
        return self


class DerivativesOptions(LabelOptions):
    """The labels alone."""

    kind: Literal["derivatives"] = "derivatives"


class DenoisingOptions(Options):
    """Derivative-based denoising (paper, eq. 5): -dE/dpositions of a noised structure predicts its noise."""

    kind: Literal["derivative_denoising"] = "derivative_denoising"
    noise_scale: float = Field(0.1, gt=0)
    """Å, standard deviation of the displacement of every coordinate (the paper's mu)."""
    sign: Literal["paper", "physical"] = "physical"
    """physical: -dE/dpositions = -noise, a restoring force; paper: = +noise, as published."""
    loss: Literal["mae", "mse"] = "mae"
    """Mean absolute or mean square error, over all components."""


class HeadDenoisingOptions(Options):
    """Denoising by a head (Zaidi et al. 2022): a vector of every atom, no derivative, predicts its noise.

    The head reads the vectors of a network that has some, and is then equivariant. Else it reads the scalars, which are
    the same however a structure is turned: noise has no direction on the average, so that such a head learns next to
    nothing but to answer zero.
    """

    kind: Literal["head_denoising"] = "head_denoising"
    noise_scale: float = Field(0.04, gt=0)
    """Å, standard deviation of the displacement of every coordinate; the head predicts noise / noise_scale."""
    loss: Literal["mae", "mse"] = "mse"
    """Mean absolute or mean square error of noise / noise_scale, over all components."""


class MixedOptions(LabelOptions):
    """Labels where there are labels, denoising where there are none, one forward pass and one physical sign for both.

    Structures without energy, forces and stress are taken to be at equilibrium, and so are those that the options here
    name. Noise is added to them, and their forces are to be restoring: -dE/dpositions = -stiffness * noise. The other
    structures stay as they are.
    """

    kind: Literal["mixed"] = "mixed"
    denoise_datasets: tuple[str, ...] = ()
    """Datasets of data.path, by the name of their directory, whose structures are all denoised: their labels are not
    learnt (those of relaxed structures with other energies than the rest, say)."""
    denoise_max_force: float | None = Field(None, gt=0)
    """eV/Å: structures of which no force is longer are denoised too, and their labels not learnt, so that one dataset
    is enough; 0.01 is little beside the restoring forces. null: none for that reason. To find them, all forces are read
    once at the start."""
    denoising_weight: float = Field(500.0, gt=0)
    """Of the error of the denoised structures' forces, eV/Å, beside the three weights of the labels."""
    noise_scale: float = Field(0.1, gt=0)
    """Å, standard deviation of the displacement of every coordinate."""
    stiffness: float = Field(1.0, gt=0)
    """eV/Å²: the restoring force per Å of displacement. In real crystals between about 1 (alkali metals) and 20
    (covalent ones); 1 keeps the numbers of derivative denoising."""
    sign: Literal["physical"] = "physical"
    loss: Literal["mae", "mse"] = "mae"
    """Mean absolute or mean square error of the denoised structures' forces; labels have the former in any case."""

    @field_validator("sign", mode="before")
    @classmethod
    def _restores(cls, value: Any) -> Any:
        if value == "paper":
            raise ValueError(
                "is 'paper', by which forces point away from equilibrium, but the labelled structures of the same run "
                "teach that they point back; expected physical, or kind derivative_denoising"
            )
        return value


class PropertyOptions(Options):
    """One number per structure, by mean absolute error: fine-tuning."""

    kind: Literal["property"] = "property"
    target: str
    """Name of a property of the dataset."""
    normalise: bool = False
    """Shift and scale the network's output by mean and spread of the training targets."""


class OptimizerOptions(Options):
    learning_rate: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)


class ScheduleOptions(Options):
    """ReduceLROnPlateau on the training loss of an epoch, summed over all ranks."""

    factor: float = Field(0.8, gt=0, lt=1)
    patience: int = Field(10, ge=0)
    threshold: float = Field(2e-4, ge=0)
    min_learning_rate: float = Field(1e-5, ge=0)


class TrainingOptions(Options):
    epochs: int = Field(100, ge=1)
    batch_size: int = Field(50, ge=1)
    """Structures per optimiser step, over all ranks and accumulation steps together."""
    batching: Literal["random", "similar_sizes"] = "random"
    """similar_sizes: the structures of a step have like numbers of edges (and the steps come in random order), so that
    ranks with few structures each still do equal work. random is the paper's."""
    grad_accumulation: int = Field(1, ge=1)
    """Micro-batches per step, at least; the edge budget may need more."""
    edge_budget: int | Literal["auto"] | None = None
    """Edges that a micro-batch of one rank may hold; null: any number. A step that needs more is computed in more
    micro-batches, with the same loss and gradient. A structure above the budget is computed alone. auto: as many as the
    first steps show to fit into memory; two such runs may learn different budgets, and then differ by rounding."""
    clip_norm: float | None = Field(10.0, gt=0)
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Exponential moving average of the weights; validation, best checkpoint and export then use the average."""
    precision: Literal["float32", "float64", "bf16", "tf32"] = "float32"
    """bf16, tf32 (GPU only): float32, but the matrix products of the layers' rows of atoms and of the read-out's hidden
    layers round their factors to that format, and so do these products' derivatives. Weights, gradients, geometry,
    filters, messages, sums, normalisation and the last map to the energy stay in float32."""
    early_stopping: int | None = Field(None, ge=1)
    """Stop after so many epochs without a better validation loss; null: train to the last epoch."""
    tested: Literal["best", "last"] = "best"
    """Whose weights the results are of: the epoch with the best validation loss, or the last one."""
    evaluation_batch_size: int = Field(64, ge=1)
    max_skipped_steps: int = Field(3, ge=0)
    """A step whose loss or gradient is not finite changes nothing and is skipped, with a warning, at most so many times
    in a run; the next one stops it (0: the first one). diverged.json in the run directory names the structures."""

    @field_validator("edge_budget", mode="before")
    @classmethod
    def _a_budget(cls, value: Any) -> Any:
        if value not in (None, "auto") and (type(value) is not int or value < 1):
            raise ValueError(f"is {value!r}, expected a number of edges, auto or null")
        return value


class EngineOptions(Options):
    kind: Literal["auto", "torch", "deepspeed"] = "auto"
    """auto: plain torch for one process, DeepSpeed for several."""
    zero_stage: Literal[0, 1, 2] = 0
    """How much DeepSpeed shards over the ranks; one process alone has nothing to shard. Stage 3 cannot work here: it
    frees weights that the inner gradient still needs."""
    deepspeed: str | None = None
    """A JSON file of DeepSpeed (configs/deepspeed) for what has no option here, such as the size of its messages."""
    world_size: int | None = Field(None, ge=1)
    """How many ranks the run must have; another number is refused. null: as many as the launcher starts."""
    pin: bool = True
    """Divide a node's cores among its ranks, unless the launcher has done so."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    rank_timeout: float = Field(60.0, ge=5)
    """Seconds within which a run ends, with rank and host named, when a rank is dead, stopped or cut off."""

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _not_stage_3(cls, value: Any) -> Any:
        if str(value) == "3":
            raise ValueError(ZERO_3)
        return value


class CheckpointOptions(Options):
    every_steps: int | None = Field(None, ge=1)
    """Besides the end of every epoch."""
    keep: int = Field(2, ge=1)
    """How many of the latest checkpoints stay, besides the best one."""
    keep_every_epochs: int | None = Field(None, ge=1)
    """Checkpoints at the end of every so many epochs stay, too; null: none."""
    on_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written (disk full, directory read-only): stop, with the last one whole; or warn,
    train on, and try again at the next one. What cannot be written by the end of the run stops it either way."""
    max_fruitless_starts: int = Field(4, ge=1)
    """A job that its queue starts again so many times in a row without reaching a new checkpoint ends with an error."""


class TransferOptions(Options):
    """What fine-tuning does with pre-trained weights. The paper's way is the default: all are loaded, the output layers
    too, and all are trained alike. Modules go by the network's names (embedding, layers.0, ...); `head` is the
    read-out: the layers after the pooling, or, in SchNet and PaiNN, those that turn each atom's features into its
    energy."""

    freeze: tuple[str, ...] = ()
    """Modules whose weights stay as they were pre-trained."""
    reset: tuple[str, ...] = ()
    """Modules that begin afresh, by the seed, such as head."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Learning rate of a layer, as a part of that of the next one; of the last layer, as a part of the head's."""
    head_learning_rate: float | None = Field(None, gt=0)
    """Of the head; null: optimizer.learning_rate. The schedule lowers both alike."""


PretrainObjective = DerivativesOptions | DenoisingOptions | HeadDenoisingOptions | MixedOptions
"""What a network can be pre-trained on."""

ObjectiveOptions = PretrainObjective | PropertyOptions
"""Options of every objective there is; `kind` tells them apart."""


def _named(model: Any) -> Any:
    """The network that is meant where none is named: the paper's first."""
    return {"name": CGCNNOptions.name, **model} if isinstance(model, dict) else model


class RunConfig(Options):
    run_dir: str
    compat: Compat = "exact"
    """exact: all neighbours within the cutoff, physical signs, a split by material, unless an option says otherwise.
    paper-experiments, paper-release: what either code of the paper did instead, and its sizes of the network; none of
    these can be given otherwise then. Rates, batches, epochs and fractions of the split are the paper's where they are
    left open; a run says where they are not (dpt_hpc/train/compat.py lists all)."""
    data: DataOptions
    model: Annotated[ModelOptions, Field(discriminator="name"), BeforeValidator(_named)] = CGCNNOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    schedule: ScheduleOptions = ScheduleOptions()
    training: TrainingOptions = TrainingOptions()
    engine: EngineOptions = EngineOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, raw: Any) -> Any:
        objective = cls.model_fields["objective"].default
        kind = getattr(objective, "kind", "property")
        return filled(raw, CGCNNOptions.name, kind) if isinstance(raw, dict) else raw

    @model_validator(mode="after")
    def _keeps_to_preset(self) -> RunConfig:
        check_preset(self.compat, self)
        return self


class PretrainConfig(RunConfig):
    task: Literal["pretrain"] = "pretrain"
    seed: int = Field(0, ge=0)
    objective: Annotated[PretrainObjective, Field(discriminator="kind")] = DerivativesOptions()

    @field_validator("data")
    @classmethod
    def _has_no_folds(cls, value: DataOptions) -> DataOptions:
        if value.split.matbench is not None:
            raise ValueError(
                "split.matbench is given, but the folds part Matbench's datasets for fine-tuning, one fold a seed: a "
                "pre-training has one split. Leave it out"
            )
        return value


class FinetuneConfig(RunConfig):
    task: Literal["finetune"] = "finetune"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One run each; the seed sets the split and the initialisation."""
    objective: PropertyOptions
    pretrained: str | None = None
    """A pre-training run, one of its checkpoints, an exported model, or the name of one that ships (`dpt-hpc models`);
    null trains from scratch (the baseline)."""
    pretrained_epochs: int | None = Field(None, ge=1)
    """Begin from the best of the run's first so many epochs: what so short a run would have exported. Its checkpoint
    must have been kept (checkpoint.keep_every_epochs=1)."""
    transfer: TransferOptions = TransferOptions()

    @model_validator(mode="after")
    def _has_the_folds(self) -> FinetuneConfig:
        if self.data.split.matbench is None:
            return self
        from dpt_hpc.data.folds import FOLDS  # not above: it brings torch, and a wrong option is told before that

        if max(self.seeds) >= FOLDS:
            raise ValueError(
                f"seeds are {list(self.seeds)}, but data.split.matbench makes them its folds: expected some of 0 to 4"
            )
        return self

    @model_validator(mode="after")
    def _has_what_it_transfers(self) -> FinetuneConfig:
        if self.pretrained is None and (self.pretrained_epochs or self.transfer.freeze or self.transfer.reset):
            raise ValueError(
                "pretrained is null: there is nothing to freeze, to reset, or to take the first epochs of; set "
                "pretrained, or leave out pretrained_epochs, transfer.freeze and transfer.reset"
            )
        return self

    @field_validator("data")
    @classmethod
    def _has_a_test_part(cls, value: DataOptions) -> DataOptions:
        if value.split.test == 0:
            raise ValueError("split.test is 0: a fine-tuning reports its error on the test part")
        return value

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) != len(value) or min(value) < 0:
            raise ValueError(f"seeds are {list(value)}, expected one or more distinct integers from 0 on")
        return value
