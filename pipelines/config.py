"""The typed settings of every job: one flat, commented list each; unknown keys are refused."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from la.data.folds import FoldLists
from la.episodes.protocols import protocol_of
from la.schedules import Schedule
from pipelines.remote_path import PathOrUri
from pipelines.workspace import digest

Prompt = Literal["mask", "point", "box", "point_box", "mixed"]
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
    """Base of all settings: frozen, strict about names, addressed by a digest of what they say."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FeaturizeConfig(Settings):
    """One pass of a frozen ViT over every photo of a COCO folder (paper section 4.1)."""

    workspace: Path
    coco_dir: PathOrUri  # a folder, or the URI of one
    train_split: str | None = None  # e.g. "train2014"; None: the newest year in the folder
    val_split: str | None = None
    backbone: str = "vit_base_patch16_224.mae"  # any plain ViT of timm
    weights: Path | None = None  # .safetensors or .pth in timm's names; None: timm's own, from the hub
    image_size: int = Field(480, ge=1)  # pixels a side; a multiple of the patch
    dtype: StoredDtype = "float16"
    skip_bad: bool = False  # leave unreadable photos out instead of stopping
    # how; none of these changes the features
    features: str | None = None  # URI of a folder, s3:// for example, that shards are copied to and taken up from
    workers: int = Field(0, ge=0)  # 0: in this process; n: Ray Data actors
    device: str = "auto"
    batch_size: int = Field(8, ge=1)  # photos at once
    shard_size: int | None = Field(None, ge=1)  # photos a file; None: by the number of photos
    threads: int | None = Field(None, ge=1)  # torch threads of each worker; None: the CPUs shared out


class VerifyConfig(Settings):
    """A look at every file of a feature store, and at some photos."""

    workspace: Path
    store: str | None = None  # key of the feature store; None: the only one in the workspace
    sample: int = Field(8, ge=0)  # photos recomputed
    repair: bool = False  # make bad files again
    coco_dir: PathOrUri | None = None  # None: where the photos were when the store was made
    weights: Path | None = None  # the local file it was made with, if there was one
    workers: int = Field(0, ge=0)  # of a repair; 0: in this process; n: Ray Data actors
    device: str = "auto"
    threads: int | None = Field(None, ge=1)


class TrainConfig(Settings):
    """Training of one model on one fold (paper section 5.2)."""

    workspace: Path
    store: str | None = None  # key of the feature store; None: the only one in the workspace
    # Workspaces of other folders, featurized alike, whose photos are trained on as well. A folder's episodes are of the
    # classes it labels; classes that stay unseen are left out of all.
    also: tuple[Path, ...] = ()
    fold: int = 0  # fold whose classes stay unseen
    fold_lists: FoldLists = "interleaved"  # which classes are a fold, see la.data.folds
    classes: Literal["seen", "all"] = "seen"  # all: a generalist, which the test classes are not new to (table 4)
    seed: int = 0
    # model: switches of la.model.label_anything.ModelConfig
    preset: str = "paper"  # or "official", "hybrid", "debug"
    dim: int | None = None  # D, channels after the neck; None: the preset's
    depth: int | None = Field(None, ge=1)  # rounds of attention, or layers of the hybrid's decoder; None: the preset's
    token_pool: bool = True
    class_example_mixer: bool = True
    spatial_convs: bool = True
    match_prototypes: bool = True  # of la.model.hybrid.HybridConfig, as all to drop_maps
    match_affinity: bool = True
    object_metric: bool = True
    objectness: int | None = Field(None, ge=0)  # channels of the shared view of the query; None: the preset's
    drop_maps: float | None = Field(None, ge=0, lt=1)  # share of matching maps left out at random; None: the preset's
    recipe: Literal["small", "paper", "official", "hybrid"] = "small"  # sets what is not given, see RECIPES
    # data
    batches: tuple[tuple[int, int, int], ...] = PAPER_BATCHES  # (B, N, K), one drawn for each step
    prompts: tuple[Literal["mask", "point", "box"], ...] = Field(("mask", "point", "box"), min_length=1)
    train_batches: int = Field(4000, ge=1)  # batches drawn once per fold; training passes over them again and again
    # optimisation
    steps: int = Field(2000, ge=1)
    lr: float = Field(3e-4, gt=0)  # after warm-up
    weight_decay: float = Field(0.01, ge=0)
    warmup_steps: int = Field(100, ge=0)
    schedule: Schedule = "cosine"  # after warm-up, changed at every step
    loss: Literal["focal", "iou"] = "focal"  # see la.evaluation.losses
    gamma: float = Field(2.0, ge=0)  # focal loss exponent
    flips: bool = False  # mirror the query's features at every second step
    ema: float = Field(0.99, ge=0, lt=1)  # decay per step of the moving average of weights that is validated and kept
    # how pixels of a class weigh, see la.evaluation.losses
    class_weights: Literal["inverse", "log", "log_batch", "none"] = "inverse"
    # selection, on seen classes of the val split
    val_every: int = Field(250, ge=1)  # steps
    val_episodes: int = Field(100, ge=1)
    checkpoint_every: int = Field(100, ge=1)  # steps
    minutes: float | None = Field(None, gt=0)  # stop at the first checkpoint after this long
    # where
    workers: int = Field(0, ge=0)  # 0: in this process; n: Ray Train workers
    device: str = "auto"
    threads: int | None = None  # torch threads of each worker; None: what torch takes
    compile: bool = False  # torch.compile: pays on long runs on a GPU

    @model_validator(mode="before")
    @classmethod
    def _follow_recipe(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        recipe = given.get("recipe") or default_recipe(given.get("preset"))
        return RECIPES.get(recipe, {}) | given | {"recipe": recipe}

    @property
    def run_name(self) -> str:
        """Name of the run's folder: readable, and a digest of every setting that changes the result."""
        settings = self.model_dump(mode="json", exclude={"workspace", "threads", "device", "compile"})
        return f"{self.preset}-fold{self.fold}-seed{self.seed}-{digest(settings, 8)}"


class ProtocolSettings(Settings):
    """Base of settings that evaluate: the protocol sets seeds and episodes where they are not given."""

    protocol: str = "la"  # of la.episodes.protocols
    seeds: int = Field(5, ge=1)
    episodes: int = Field(1000, ge=1)  # of each seed

    @model_validator(mode="before")
    @classmethod
    def _follow_protocol(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        protocol = protocol_of(given.get("protocol", "la"))
        given = {name: value for name, value in given.items() if name not in ("seeds", "episodes") or value is not None}
        return {"seeds": protocol.seeds, "episodes": protocol.episodes} | given


class EvaluateConfig(ProtocolSettings):
    """Evaluation of one method on the unseen classes of one fold by a protocol (paper section 5.1)."""

    workspace: Path
    store: str | None = None
    method: str = "la"  # "la" (needs a checkpoint) or the name of a baseline
    checkpoint: Path | None = None  # a run's folder or a checkpoint file
    fold: int = 0
    ways: int = Field(1, ge=1)
    shots: int = Field(1, ge=1)
    prompt: Prompt = "mask"  # "mixed": each annotation one of the three
    supports: Literal["fixed", "varied"] = "fixed"  # varied: 1 to K shots a class, photos that serve several classes
    support_selection: Literal["random", "nearest"] = "random"  # nearest: the photos most like the query
    classes: Literal["unseen", "seen"] = "unseen"
    split: Literal["val", "train"] = "val"
    # variants of a trained model at test time, see la.evaluation.test_time
    pool_draws: int = Field(0, ge=0)  # mean over so many draws of the token-pool rows; 0: fixed rows
    flips: bool = False  # mean with the query's features flipped
    gallery: Path | None = None  # draw the best, median and worst episodes into this JPEG
    device: str = "auto"
    threads: int | None = None


class TrialPlacement(Settings):
    """Where the trials of a sweep run: none of it changes a result."""

    concurrent: int | None = Field(None, ge=1)  # trials at once; None: as many as the CPUs and GPUs take
    threads: int = Field(1, ge=1)  # CPU threads of each trial, or of each of its workers
    gpus: float | None = Field(None, ge=0)  # GPUs of each trial, a fraction shares one; None: one where there are any
    device: str = "auto"
    tracking_uri: str | None = None  # an MLflow server; None: MLFLOW_TRACKING_URI, else the workspace's database


class SweepConfig(ProtocolSettings, TrialPlacement):
    """A study: every variant trained and evaluated on every fold (paper section 5.4)."""

    workspace: Path
    store: str | None = None  # key of the feature store; None: the only one in the workspace
    study: str = "ablations"  # of sweeps.studies.registry
    variants: tuple[str, ...] | None = None  # names; None: all of the study
    folds: tuple[int, ...] = Field((0,), min_length=1)
    train: dict[str, Any] = {}  # other TrainConfig fields, the same for every variant
    # evaluation: the same for every variant, (ways x shots x prompts) on unseen classes
    ways: tuple[int, ...] = Field((1, 2), min_length=1)
    shots: tuple[int, ...] = Field((1,), min_length=1)
    prompts: tuple[Prompt, ...] = Field(PROMPTS, min_length=1)


class SearchConfig(TrialPlacement):
    """A search for settings of training by what they reach on seen classes."""

    workspace: Path
    store: str | None = None  # key of the feature store; None: the only one in the workspace
    also: tuple[Path, ...] = ()  # as in training
    fold: int = Field(0, ge=0, le=3)  # its classes stay unseen, by the search too
    presets: tuple[str, ...] = Field(("paper", "hybrid"), min_length=1)
    trials: int = Field(30, ge=1)  # that finish or are stopped early
    steps: int = Field(2000, ge=1)  # of a trial that is not stopped early
    batch_scale: float = Field(1.0, gt=0)  # times B in the recipes' batches
    val_episodes: int = Field(200, ge=1)  # of seen classes, of each validation
    seed: int = 0  # of the sampler and of every training
    workers: int = Field(0, ge=0)  # Ray Train workers of each trial; 0: it trains in its own process


class PredictConfig(Settings):
    """Segmentation of a folder of photos by annotated supports."""

    checkpoint: str  # a run's folder, a checkpoint file, or "demo"
    support: Path | None = None  # a COCO instances file, or a folder of labelme JSON
    prototypes: tuple[Path, ...] = ()  # files of saved prototypes, beside or instead of `support`
    images: Path  # a folder of photos, or one photo
    out: Path
    classes: tuple[str, ...] = ()  # of `support`; none: all
    support_images: Path | None = None  # folder of the supports' photos; None: near the file
    support_selection: Literal["random", "nearest"] = "random"  # nearest: the supports most like each photo
    shots: int | None = Field(None, ge=1)  # supports of each class; None: all
    seed: int = 0  # of the random selection
    save_prototypes: Path | None = None  # write the supports here, for later without their photos
    weights: Path | None = None  # of the backbone; None: timm's own, from the hub
    backbone: str | None = None  # with `image_size`, for checkpoints that do not name theirs
    image_size: int | None = Field(None, ge=1)
    device: str = "auto"
    threads: int | None = Field(None, ge=1)


class ServeConfig(Settings):
    """The web page and the HTTP API: a model, an address, and limits on what users may hand in."""

    checkpoint: str = "demo"  # a run's folder, a checkpoint file, or "demo"
    weights: Path | None = None  # of the backbone; None: timm's own, from the hub
    backbone: str | None = None  # with `image_size`, for checkpoints that do not name theirs
    image_size: int | None = Field(None, ge=1)
    device: str = "auto"
    threads: int | None = Field(None, ge=1)
    replicas: int | None = Field(None, ge=1)  # of the model, on Ray; None: one in the server's own process
    host: str = "127.0.0.1"  # this machine alone
    port: int = Field(8080, ge=0, le=65535)
    max_photo_mb: int = Field(10, ge=1)  # megabytes of one file
    max_photo_pixels: int = Field(25_000_000, ge=1)  # 75 MB once decoded
    max_photos: int = Field(16, ge=1)  # supports of a class set; queries of a page
    max_classes: int = Field(20, ge=1, le=255)  # of a class set
    max_request_mb: int = Field(64, ge=1)  # megabytes of all files of one request
    max_class_sets: int = Field(64, ge=1)  # of the API, kept at once
    max_pages: int = Field(32, ge=1)  # open at once
    idle_minutes: float = Field(60, gt=0)  # after which a class set of the API is forgotten
    max_waiting: int = Field(32, ge=1)  # jobs in the queue; further ones are refused
