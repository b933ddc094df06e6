"""The typed settings of every job, each said once: name, type, default, bounds and what it does.

Options of the command line, their help, experiment files, MLflow's params and docs/settings.md are made from them. A
setting that is added here is there in all of these.
"""

import inspect
import types
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from la.data.folds import FoldLists
from la.episodes.protocols import PROTOCOLS, protocol_of
from la.schedules import Schedule
from pipelines.remote_path import PathOrUri

Prompt = Literal["mask", "point", "box", "point_box", "mixed"]
Recipe = Literal["small", "paper", "official", "hybrid"]
Beta = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
StoredDtype = Literal["float16", "int8"]  # of features in a store; int8 has a scale per token
# (B, N, K) of a training batch on one worker (section 5.2)
PAPER_BATCHES = ((4, 1, 4), (2, 4, 2), (8, 1, 2), (4, 2, 2), (4, 4, 1), (16, 1, 1))
OFFICIAL_BATCHES = ((2, 1, 4), (2, 4, 2), (2, 1, 2), (4, 2, 2), (4, 4, 1), (16, 1, 1))
HYBRID_BATCHES = ((12, 1, 1), (8, 1, 5), (6, 2, 1), (3, 4, 1))
# Settings that belong together; those that are given win over the recipe's.
RECIPES: dict[str, dict[str, Any]] = {
    "small": {},  # the defaults below, found on a few hundred photos
    "paper": {  # section 5.2, for all of COCO
        "batches": PAPER_BATCHES,
        "lr": 1e-5,
        "warmup_steps": 1000,
        "schedule": "cosine",
        "class_weights": "inverse",
        "ema": 0.0,
    },
    "official": {  # of the released checkpoints
        "batches": OFFICIAL_BATCHES,
        "lr": 5e-5,
        "warmup_steps": 1000,
        "schedule": "constant",
        "class_weights": "log_batch",
        "ema": 0.0,
    },
    "hybrid": {  # of the hybrid preset, found on a few hundred photos
        "batches": HYBRID_BATCHES,
        "lr": 3e-3,
        "warmup_steps": 30,
        "loss": "iou",
        "flips": True,
        "ema": 0.98,
    },
}


def scaled_batches(recipe: str, scale: float) -> tuple[tuple[int, int, int], ...]:
    """The (B, N, K) of a recipe with `scale` times B, at least 1."""
    batches = RECIPES[recipe].get("batches", PAPER_BATCHES)
    return tuple((max(1, round(scale * b)), n, k) for b, n, k in batches)


def default_recipe(preset: str | None) -> str:
    """The recipe of a preset where none is named."""
    return "hybrid" if preset == "hybrid" else "small"


PROMPTS: tuple[Prompt, ...] = ("mask", "point", "box", "point_box")  # of the paper's table 6


class Settings(BaseModel):
    """Base of all settings: frozen, strict about names. Lists may be given as text, "0,1" or "4x1x4,2x4x2"."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
    panel: ClassVar[str] = "Settings"  # heading of the settings that a class declares, in --help and in the docs

    @field_validator("*", mode="before")
    @classmethod
    def _split_text(cls, value: Any, info: ValidationInfo) -> Any:
        of_entries = entry_type(cls.model_fields[info.field_name].annotation)
        if not isinstance(value, str) or of_entries in (None, Path):
            return value
        entries = [entry.strip() for entry in value.split(",")]
        return [entry.split("x") for entry in entries] if get_origin(of_entries) is tuple else entries


def plain_type(annotation: Any) -> Any:
    """The type of a setting that is given: T for `T | None`."""
    if get_origin(annotation) is Annotated:
        return plain_type(get_args(annotation)[0])
    kinds = [kind for kind in get_args(annotation) if kind is not types.NoneType]
    return (
        plain_type(kinds[0]) if get_origin(annotation) in (Union, types.UnionType) and len(kinds) == 1 else annotation
    )


def entry_type(annotation: Any) -> Any:
    """The type of a list's entries; None for a setting that is no list."""
    plain = plain_type(annotation)
    return plain_type(get_args(plain)[0]) if get_origin(plain) is tuple else None


def panel_of(settings: type[Settings], name: str) -> str:
    """The heading of a field: that of the class that declares it."""
    return next(kind.panel for kind in settings.__mro__ if name in inspect.get_annotations(kind))


def fields_of(settings: type[Settings]) -> list[str]:
    """Names of the fields that have a description, a class's own before those of its bases."""
    fields = dict.fromkeys(name for kind in settings.__mro__ for name in inspect.get_annotations(kind))
    return [f for f in fields if f in settings.model_fields and settings.model_fields[f].description]


def closest(name: str, settings: type[Settings]) -> str:
    """The names of fields that are spelled most like `name`, with commas; all where none is."""
    fields = fields_of(settings)
    return ", ".join(get_close_matches(name, fields, 3, 0.4) or fields)


def setting(default: Any, about: str, flag: str | None = None, envvar: str | None = None, **bounds: Any) -> Any:
    """A field of settings: its default (... where it must be given), what it does, and its bounds as pydantic has them.

    `flag`: its option, where that is not the field's name; `envvar`: a variable that sets it where no option does.
    """
    return Field(default, description=about, json_schema_extra={"flag": flag, "envvar": envvar}, **bounds)


class WorkspaceSettings(Settings):
    """Where a study lies."""

    panel: ClassVar[str] = "Where"
    workspace: Annotated[Path, AfterValidator(Path.absolute)] = setting(
        Path("workspace"), "Folder of everything a study makes.", envvar="LA_WORKSPACE"
    )


class StoreSettings(WorkspaceSettings):
    """Which features are read."""

    store: str | None = setting(None, "Key of the feature store, where the workspace has several.")


class DeviceSettings(Settings):
    """What computes; none of it changes a result."""

    panel: ClassVar[str] = "Where"
    device: str = setting("auto", "auto, cpu, cuda or cuda:1; auto takes CUDA where there is a GPU.")
    threads: int | None = setting(None, "Torch threads of each process; not given: what torch takes.", ge=1)


class BackboneSettings(Settings):
    """The frozen ViT."""

    backbone: str = setting("vit_base_patch16_224.mae", "Any plain ViT of timm.")
    weights: Path | None = setting(None, "Local weights in timm's names; not given: timm's own, from its hub.")
    image_size: int = setting(480, "Side in pixels that photos are resized to, a multiple of the patch.", ge=1)


class FeaturizeConfig(BackboneSettings, DeviceSettings, WorkspaceSettings):
    """One pass of a frozen ViT over every photo of a COCO folder (paper section 4.1)."""

    panel: ClassVar[str] = "Features"
    coco_dir: PathOrUri = setting(
        Path("coco"), "Folder or URI with annotations/, train2017/ and val2017/.", envvar="LA_COCO_DIR"
    )
    train_split: str | None = setting(None, "Such as train2014; not given: the newest year there.")
    val_split: str | None = setting(None, "Such as val2014; not given: the newest year there.")
    dtype: StoredDtype = setting("float16", "Stored features; int8, a scale per token, takes half the bytes.")
    skip_bad: bool = setting(False, "Leave out photos that cannot be read, instead of stopping.")
    # none of these changes the features
    features: str | None = setting(
        None, "Copy every shard to this folder too, s3://bucket/folder for example, and go on from what lies there."
    )
    workers: int = setting(0, "Ray Data workers; 0: in this process.", ge=0)
    batch_size: int = setting(8, "Photos at once through the ViT.", ge=1)
    shard_size: int | None = setting(None, "Photos a file; not given: by the number of photos.", ge=1)


class VerifyConfig(DeviceSettings, StoreSettings):
    """A look at every file of a feature store, and at some photos."""

    panel: ClassVar[str] = "Check"
    sample: int = setting(8, "Photos featurized again and compared.", ge=0)
    repair: bool = setting(False, "Make the bad files again, and only these.")
    coco_dir: PathOrUri | None = setting(None, "Folder or URI of the photos; not given: as when featurized.")
    weights: Path | None = setting(None, "The local weights that the store was made with, if there were any.")
    workers: int = setting(0, "Ray Data workers of a repair; 0: in this process.", ge=0)


class LabelAnythingSettings(Settings):
    """Parts of LA (presets paper, official, debug): section 4, switched off in table 5."""

    panel: ClassVar[str] = "Model: LA"
    token_pool: bool = setting(True, "The token pool, section 4.2.")
    class_example_mixer: bool = setting(True, "The class-example mixer, section 4.3.")


class HybridSettings(Settings):
    """Parts of the hybrid preset: docs/hybrid.md."""

    panel: ClassVar[str] = "Model: hybrid"
    match_prototypes: bool = setting(True, "Cosines to prototypes.")
    match_affinity: bool = setting(True, "Affinity to all support tokens.")
    object_metric: bool = setting(True, "Matching in a metric fitted to objects.")
    objectness: int | None = setting(None, "Channels of the query that all classes share.", ge=0)
    drop_maps: float | None = setting(None, "Share of matching maps left out at random.", ge=0, lt=1)


class ModelSettings(LabelAnythingSettings, HybridSettings):
    """The heads; what is not given is the preset's."""

    panel: ClassVar[str] = "Model"
    preset: str = setting("paper", "paper (1.4 M parameters), official (10.1 M), hybrid (matching maps) or debug.")
    dim: int | None = setting(None, "D, channels after the neck; not given: the preset's.")
    depth: int | None = setting(None, "Rounds of attention, or layers of the hybrid's decoder.", ge=1)
    spatial_convs: bool = setting(True, "The decoder's spatial convolutions, section 4.4.")


def whole_path(source: str) -> str:
    """`source` from the root on, as workers have other working folders; "demo" stays."""
    return source if source == "demo" else str(Path(source).absolute())


class OptimisationSettings(Settings):
    """How weights are found (paper section 5.2); a recipe sets what is not given."""

    panel: ClassVar[str] = "Optimisation"
    recipe: Recipe = setting(
        "small",
        "Settings that belong together, of which given ones win: for a few hundred photos, the paper's, the released "
        "model's, the hybrid's; not given: the hybrid preset's own, else small.",
    )
    init: Annotated[str, AfterValidator(whole_path)] | None = setting(
        None, "A run's folder or a checkpoint file whose weights training starts from."
    )
    steps: int = setting(2000, "Optimisation steps.", ge=1)
    minutes: float | None = setting(None, "Stop at the first checkpoint after this long.", gt=0)
    lr: float = setting(3e-4, "Learning rate after warm-up.", gt=0)
    weight_decay: float = setting(0.01, "Weight decay of AdamW.", ge=0)
    decay: Literal["all", "matrices"] = setting(
        "all", "What weights decay; matrices: no norms, biases, learned tokens."
    )
    betas: tuple[Beta, Beta] = setting((0.9, 0.999), "Decay of AdamW's means of gradients and of their squares.")
    clip: float | None = setting(None, "Largest norm of a step's gradients; not given: unclipped.", gt=0)
    accumulate: int = setting(1, "Batches of a step on each worker; its loss is their mean.", ge=1)
    warmup_steps: int = setting(100, "Steps of rising learning rate.", ge=0)
    schedule: Schedule = setting("cosine", "Course of the learning rate after warm-up.")
    schedule_steps: int | None = setting(None, "Length of the schedule in steps; not given: --steps.", ge=1)
    loss: Literal["focal", "iou"] = setting("focal", "What is minimised, see la.evaluation.losses.")
    gamma: float = setting(2.0, "Exponent of the focal loss.", ge=0)
    class_weights: Literal["inverse", "log", "log_batch", "none"] = setting(
        "inverse", "How the loss weighs a class by its share of pixels."
    )
    flips: bool = setting(False, "Mirror the query's features at every second step.")
    ema: float = setting(0.99, "Decay a step of the moving average that is validated and kept.", ge=0, lt=1)


class TrainConfig(ModelSettings, OptimisationSettings, DeviceSettings, StoreSettings):
    """Training of one model on one fold (paper section 5.2)."""

    panel: ClassVar[str] = "Data"
    fold: int = setting(0, "COCO-20i fold, 0 to 3; its 20 classes stay unseen.")
    fold_lists: FoldLists = setting("interleaved", "Which classes are a fold; protocol panet: contiguous.")
    classes: Literal["seen", "all"] = setting(
        "seen", "all: train on the fold's test classes too, a generalist as in table 4.", flag="fold-classes"
    )
    also: tuple[Annotated[Path, AfterValidator(Path.absolute)], ...] = setting(
        (),
        "Workspace of another folder, featurized alike, to train on too, on all classes it labels but the unseen ones; "
        "may be given repeatedly.",
    )
    name: str | None = setting(None, "Folder of the run in the workspace's runs; not given: named by its settings.")
    seed: int = setting(0, "Seed of weights and training episodes.")
    batches: tuple[tuple[Count, Count, Count], ...] = setting(
        PAPER_BATCHES, "(B, N, K) of a worker's batches, one drawn for each step, such as 4x1x4,2x4x2.", min_length=1
    )
    batch_scale: float = setting(
        1.0, "Times B in the recipe's (B, N, K); 0.5 halves memory and time.", ge=0.01, exclude=True
    )
    prompts: tuple[Literal["mask", "point", "box"], ...] = setting(
        ("mask", "point", "box"), "Kinds of prompt that training episodes mix.", min_length=1, flag="train-prompts"
    )
    train_batches: int | None = setting(None, "Batches passed over again and again; not given: no end of them.", ge=1)
    # selection, on seen classes of the val split
    val_every: int = setting(250, "Steps between validations on seen classes.", ge=1)
    val_episodes: int = setting(100, "Episodes of seen classes that choose the checkpoint.", ge=1)
    checkpoint_every: int = setting(100, "Steps between checkpoints: what a kill can lose.", ge=1)
    workers: int = setting(0, "Ray Train workers; 0: in this process.", ge=0)
    compile: bool = setting(False, "Use torch.compile; pays on long runs on a GPU.")

    @model_validator(mode="before")
    @classmethod
    def _follow_recipe(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        recipe = given.get("recipe") or default_recipe(given.get("preset"))
        known = RECIPES.get(recipe, {}) | given | {"recipe": recipe}
        scale = known.get("batch_scale", 1.0)
        if "batches" in given or recipe not in RECIPES or not isinstance(scale, float | int) or not scale > 0:
            return known
        return known | {"batches": scaled_batches(recipe, scale)}

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the settings that are not as preset and recipe have them."""
        usual = type(self)(preset=self.preset, recipe=self.recipe)
        names = (name for name, field in type(self).model_fields.items() if not field.exclude)
        return tuple(name for name in names if getattr(self, name) != getattr(usual, name))


class ProtocolSettings(Settings):
    """What decides how episodes are drawn and scored; the protocol sets the numbers that are not given."""

    panel: ClassVar[str] = "Evaluation"
    protocol: Literal[tuple(PROTOCOLS)] = setting(
        "la", "How episodes are drawn and scored; numbers compare within one."
    )
    seeds: int = setting(5, "Sets of episodes, mean and std are over them; not given: the protocol's.", ge=1)
    episodes: int = setting(1000, "Episodes of each seed; not given: the protocol's.", ge=1)

    @model_validator(mode="before")
    @classmethod
    def _follow_protocol(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        protocol = protocol_of(given.get("protocol", "la"))
        given = {name: value for name, value in given.items() if name not in ("seeds", "episodes") or value is not None}
        return {"seeds": protocol.seeds, "episodes": protocol.episodes} | given


class EvaluateConfig(ProtocolSettings, DeviceSettings, StoreSettings):
    """Evaluation of one method on the unseen classes of one fold by a protocol (paper section 5.1)."""

    panel: ClassVar[str] = "Evaluation"
    method: str = setting("la", "la, or a method without training of la.evaluation.baselines, such as prototype.")
    checkpoint: Path | None = setting(
        None, "A run's folder or a checkpoint file; not given: the fold's newest finished run."
    )
    fold: int = setting(0, "COCO-20i fold, 0 to 3; its 20 classes stay unseen.")
    ways: int = setting(1, "Classes of an episode.", ge=1)
    shots: int = setting(1, "Support images of each class.", ge=1)
    prompt: Prompt = setting("mask", "Prompts on the supports; mixed: each annotation one of the three.")
    supports: Literal["fixed", "varied"] = setting(
        "fixed", "K shots of every class, or 1 to K, where a photo of several classes counts for each."
    )
    support_selection: Literal["random", "nearest"] = setting(
        "random", "nearest: of each class the photos most like the query, by their features."
    )
    classes: Literal["unseen", "seen"] = setting("unseen", "Which classes of the fold.", flag="fold-classes")
    split: Literal["val", "train"] = setting("val", "Which photos.")
    # variants of a trained model at test time, see la.evaluation.test_time
    pool_draws: int = setting(0, "Mean over so many draws of the token-pool rows; 0: fixed rows.", ge=0)
    flips: bool = setting(False, "Mean with the query's features flipped.")
    gallery: Path | None = setting(None, "Draw the best, median and worst episodes into this JPEG.")


class EpisodesConfig(StoreSettings):
    """Episodes drawn to be looked at before anything is trained on them."""

    panel: ClassVar[str] = "Episodes"
    folds: tuple[int, ...] = setting((0, 1, 2, 3), "COCO-20i folds, such as 0 or 0,1,2,3.", min_length=1)
    train_batches: int | None = setting(
        None, "As of `train`; not given: the first, as training draws the others.", ge=1
    )
    ways: tuple[Count, ...] = setting((1, 2), "Classes of the test episodes.", min_length=1)
    shots: tuple[Count, ...] = setting((1,), "Support images of each class in the test episodes.", min_length=1)
    prompt: Prompt = setting("mask", "Prompts on the supports; mixed: each annotation one of the three.")
    supports: Literal["fixed", "varied"] = setting("fixed", "K shots of every class, or 1 to K.")
    seeds: int = setting(5, "Sets of test episodes.", ge=1)
    episodes: int = setting(1000, "Test episodes of each seed.", ge=1)
    seed: int = setting(0, "Seed of the training episodes.")
    workers: int = setting(0, "Processes that draw, which changes no episode; 0: in this process.", ge=0)


class ProfileConfig(DeviceSettings, StoreSettings):
    """Seconds and memory of inference as shots grow (table 2)."""

    panel: ClassVar[str] = "Profile"
    shots: tuple[Count, ...] = setting((1, 2, 5, 10), "Support images of each class.", min_length=1)
    methods: tuple[str, ...] = setting(
        ("la", "hybrid", "affinity"),
        "Some of la, hybrid and the methods of la.evaluation.baselines; affinity is dense, as in DCAMA.",
    )
    preset: str = setting("official", "LA of random weights: paper, official or debug.")
    checkpoint: Annotated[Path, AfterValidator(Path.absolute)] | None = setting(
        None, "A run's folder or checkpoint, in place of --preset."
    )
    fold: int = setting(0, "COCO-20i fold, 0 to 3; its 20 classes stay unseen.")
    from_photos: bool = setting(True, "Measure from photos as well, through the store's ViT.")
    weights: Annotated[Path, AfterValidator(Path.absolute)] | None = setting(
        None, "Local weights in timm's names; not given: timm's own, from its hub."
    )
    supports_at_once: int = setting(1, "Supports at once through LA and the ViT; more take more memory.", ge=1)
    repeats: int = setting(5, "Timed runs of each cell; the median counts.", ge=1)


class PlanConfig(BackboneSettings, DeviceSettings):
    """What a study is to be, and where it will run."""

    panel: ClassVar[str] = "Study"
    coco_dir: PathOrUri | None = setting(
        None, "Folder or URI whose photos are counted, and the supports that its classes have; not given: COCO's."
    )
    photos: int | None = setting(None, "Photos to featurize, all splits; not given: those of --coco-dir or COCO.", ge=1)
    dtype: StoredDtype = setting("float16", "Stored features; int8, a scale per token, takes half the bytes.")
    workers: int = setting(1, "Processes that work at once, one for each GPU.", ge=1)
    nodes: int = setting(1, "Machines that the workers are spread over.", ge=1)
    ram_gb: float | None = setting(None, "Memory of each node, 1e9 bytes; not given: this one's.", ge=1)
    folds: int = setting(4, "Folds to train and to sweep.", ge=1, le=4)
    steps: int = setting(2000, "Optimisation steps.", ge=1)
    preset: str = setting("paper", "paper (1.4 M parameters), official (10.1 M), hybrid (matching maps) or debug.")
    recipe: Recipe | None = setting(
        None, "As of `train`; not given: the preset's, and each variant's own in the sweep."
    )
    batch_scale: float = setting(1.0, "Times B in the recipe's (B, N, K); 0.5 halves memory and time.", ge=0.01)
    seeds: int = setting(5, "Sets of test episodes of the sweep.", ge=1)
    episodes: int = setting(1000, "Test episodes of each set.", ge=1)
    featurize_rate: float | None = setting(None, "Photos a second of one worker; not given: measured here.", ge=0.001)
    steps_per_second: float | None = setting(
        None, "Steps of one worker, features in memory; not given: measured here.", ge=0.001
    )
    read_mb_per_second: float | None = setting(
        None, "MB of each node's way to the features; not given: measured here.", ge=0.1
    )


class BenchConfig(StoreSettings):
    """Sizes of measurements; what is not given is each measurement's own."""

    panel: ClassVar[str] = "Measurement"
    coco_dir: PathOrUri | None = setting(None, "Folder or URI of the store's photos, for featurizing.")
    weights: Path | None = setting(None, "Local weights in timm's names; not given: timm's own, from its hub.")
    backbone: str | None = setting(None, "Any plain ViT of timm, for featurizing and predict.")
    image_size: int | None = setting(None, "Side in pixels that photos are resized to.", ge=1)
    preset: str | None = setting(None, "paper, official, hybrid or debug.")
    repeats: int | None = setting(None, "Pairs of passes; the median counts.", ge=1)
    photos: int | None = setting(None, "Photos of each pass.", ge=8)
    episodes: int | None = setting(None, "1-way 1-shot episodes that are evaluated.", ge=1)
    steps: int | None = setting(None, "Steps of each training that count, after 20 that do not.", ge=10)
    batch_scale: float | None = setting(None, "Times B in the recipe's (B, N, K), in training.", ge=0.01)
    trials: int | None = setting(None, "Made-up trials of a sweep, which sleep; a multiple of 4.", ge=4)
    fold: int | None = setting(None, "COCO-20i fold, 0 to 3, whose episodes are drawn.")
    ways: int | None = setting(None, "Classes of the query's episode.", ge=1)
    shots: int | None = setting(None, "Support images of each class of the query's episode.", ge=1)
    device: str | None = setting(None, "auto, cpu, cuda or cuda:1, in training; auto takes CUDA where there is a GPU.")
    threads: int | None = setting(None, "Torch threads of each process; not given: what torch takes.", ge=1)
    out: Path | None = setting(None, "JSON file of all; not given: artifacts/bench.json in the workspace.")


class TrialPlacement(WorkspaceSettings):
    """Where the trials of a sweep run: none of it changes a result."""

    panel: ClassVar[str] = "Where"
    store: str | None = setting(None, "Key of the feature store, where the workspace has several.")
    concurrent: int | None = setting(None, "Trials at once; not given: as many as CPUs and GPUs take.", ge=1)
    threads: int = setting(1, "CPU threads of each trial, or of each of its workers.", ge=1)
    gpus: float | None = setting(
        None, "GPUs of each trial, a fraction shares one; not given: one where there are any.", ge=0
    )
    device: str = setting("auto", "auto, cpu, cuda or cuda:1; auto takes CUDA where there is a GPU.")
    tracking_uri: str | None = setting(
        None, "An MLflow server; not given: MLFLOW_TRACKING_URI, else the workspace's database."
    )


class SweepConfig(ProtocolSettings, TrialPlacement):
    """A study: every variant trained and evaluated on every fold (paper section 5.4)."""

    panel: ClassVar[str] = "Study"
    study: str = "ablations"  # its name, or its file
    variants: tuple[str, ...] | None = setting(None, "Names of some variants; not given: all of the study.")
    folds: tuple[int, ...] = setting((0,), "COCO-20i folds, such as 0 or 0,1,2,3.", min_length=1)
    train_seeds: tuple[int, ...] = setting((0,), "Seeds of training, each a trial; tables are over them.", min_length=1)
    train: dict[str, Any] = {}  # other TrainConfig fields, equal for every variant
    # evaluation, equal for every variant: (ways x shots x prompts) on unseen classes
    ways: tuple[Count, ...] = setting((1, 2), "Ways of the evaluations.", min_length=1)
    shots: tuple[Count, ...] = setting((1,), "Shots of the evaluations.", min_length=1)
    prompts: tuple[Prompt, ...] = setting(PROMPTS, "Prompts of the evaluations.", min_length=1)


class SettingSpace(Settings):
    """What a search may give a setting: one of `values`, or a number from `low` to `high`.

    With `relative`, values are multiples of, or added to, what the preset and its recipe have.
    """

    values: tuple | None = None
    low: float | None = None
    high: float | None = None
    log: bool = False  # evenly by orders of magnitude
    relative: Literal["times", "plus"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _list(cls, given: Any) -> Any:
        return {"values": given} if isinstance(given, list | tuple) else given

    @model_validator(mode="after")
    def _one_kind(self) -> "SettingSpace":
        ranged = self.low is not None and self.high is not None and self.low < self.high
        if bool(self.values) == ranged or (self.log and not (self.low or 0) > 0):
            raise ValueError("expected a list of values, or low < high, above 0 with log")
        return self


class SearchConfig(TrialPlacement):
    """A search for settings of training by what they reach on seen classes."""

    panel: ClassVar[str] = "Search"
    study: str = "search"  # its name, or its file
    space: dict[str, SettingSpace] = {}  # setting of training -> what it may be
    train: dict[str, Any] = {}  # other settings of training, which are not searched
    trials: int = setting(30, "Trials that finish or are stopped early; with more, an ended search goes on.", ge=1)
    hours: float | None = setting(None, "Begin no further trial after so many hours.", gt=0)
    fold: int = setting(0, "COCO-20i fold, 0 to 3; its 20 classes stay unseen, by the search too.", ge=0, le=3)
    steps: int = setting(2000, "Training steps of a trial that is not stopped early.", ge=1)
    val_episodes: int = setting(200, "Episodes of seen classes of each validation.", ge=1)
    sampler: Literal["tpe", "random"] = setting("tpe", "What proposes: Optuna's TPE, from earlier results, or chance.")
    early_stopping: bool = setting(True, "Stop poor trials early (ASHA).")
    seed: int = setting(0, "Seed of the sampler and of every training.")

    @property
    def spaces(self) -> dict[str, SettingSpace]:
        """The settings that are searched: those that were given are not."""
        return {name: space for name, space in self.space.items() if name not in self.train}


class CheckpointSettings(DeviceSettings):
    """Which model segments photos."""

    panel: ClassVar[str] = "Model"
    checkpoint: str = setting("demo", "A run's folder, its best.pt, or demo, which comes with the product.")
    weights: Path | None = setting(None, "Local weights of the backbone; not given: timm's own, from its hub.")
    backbone: str | None = setting(None, "Any plain ViT of timm, for checkpoints that do not name theirs.")
    image_size: int | None = setting(None, "In pixels, for checkpoints that do not say theirs.", ge=1)


class PredictConfig(CheckpointSettings):
    """Segmentation of a folder of photos by annotated supports."""

    panel: ClassVar[str] = "Photos"
    images: Path = setting(..., "A folder of photos, or one photo.")
    out: Path = setting(..., "Folder for masks, overlays and results.json.")
    support: Path | None = setting(None, "Annotated photos: a COCO instances file, or a folder of labelme JSON.")
    prototypes: tuple[Path, ...] = setting(
        (), "Classes saved before, beside or instead of --support; may be given repeatedly."
    )
    save_prototypes: Path | None = setting(None, "Save the classes here, for later without their photos.")
    classes: tuple[str, ...] = setting((), "Only these classes of --support, such as cat,dog.")
    support_images: Path | None = setting(None, "Folder of the supports' photos; not given: near the file.")
    support_selection: Literal["random", "nearest"] = setting(
        "random", "nearest: for each photo the supports most like it."
    )
    shots: int | None = setting(None, "Support images of each class; not given: all.", ge=1)
    seed: int = setting(0, "Seed of the random selection.")


class ServeConfig(CheckpointSettings):
    """The web page and the HTTP API: a model, an address, and limits on what users may hand in."""

    panel: ClassVar[str] = "Server"
    host: str = setting("127.0.0.1", "Address to listen on; 0.0.0.0: all, for everybody on the network.")
    port: int = setting(8080, "0: any that is free.", ge=0, le=65535)
    replicas: int | None = setting(
        None, "Copies of the model, each a process on Ray; not given: one, without Ray.", ge=1
    )
    max_photo_mb: int = setting(10, "Megabytes of one photo.", ge=1)
    max_photo_pixels: int = setting(25_000_000, "Pixels of one photo; 25 million are 75 MB decoded.", ge=1)
    max_photos: int = setting(16, "Supports of a class set, and queries of a page.", ge=1)
    max_classes: int = setting(20, "Classes of a class set.", ge=1, le=255)
    max_request_mb: int = setting(64, "Megabytes of all files of one request.", ge=1)
    max_class_sets: int = setting(64, "Class sets of the API, kept at once.", ge=1)
    max_pages: int = setting(32, "Pages open at once.", ge=1)
    idle_minutes: float = setting(60, "Minutes after which a class set of the API is forgotten.", gt=0)
    max_waiting: int = setting(32, "Jobs in the queue; further ones are refused.", ge=1)
