"""What changes while a model trains, and its form in a checkpoint; `pipelines.training.resume` says when it is read."""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from la.model.hybrid import Hybrid
from la.model.label_anything import LabelAnything, save_state, today_names
from pipelines.config import TrainConfig
from pipelines.store.reader import FeatureStore


@dataclass
class TrainState:
    """Weights, their moving average, the optimiser, and how far the run is."""

    model: nn.Module
    average: AveragedModel  # single steps on few episodes swing the balance of background and classes; this is kept
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    step: int = 0
    seconds: float = 0.0  # of training, over all starts
    best: dict | None = None  # the checkpoint that was best on seen classes
    best_miou: float = -1.0  # in percent
    curve: list[dict] = field(default_factory=list)  # all reports
    losses: list[Tensor] = field(default_factory=list)  # of the steps since the last report
    unchecked: list[Tensor] = field(default_factory=list)  # (loss, gradient norm) of the steps since the last check
    validation_due: bool = False  # one was stopped, and comes before the next step
    starts: list[int] = field(default_factory=list)  # the step of each start
    before_end: dict | None = None  # see `note_before_end`
    # not saved: since the last report
    episodes: int = 0
    since: float = field(default_factory=time.perf_counter)
    _started: float = field(default_factory=time.perf_counter)  # of this start, less the seconds before

    def advance(self, loss: Tensor, norm: Tensor, episodes: int) -> None:
        """Count a step by its loss, the norm of its gradients and its episodes, of all workers."""
        self.step += 1
        self.seconds = time.perf_counter() - self._started
        self.losses.append(loss)
        self.unchecked.append(torch.stack([loss, norm]))
        self.episodes += episodes

    def measure(self) -> dict:
        """Step, mean loss, rate, episodes a second and seconds, as they are reported."""
        return {
            "step": self.step,
            "loss": torch.stack(self.losses).mean().item(),
            "lr": self.schedule.get_last_lr()[0],
            "episodes_per_s": self.episodes / (time.perf_counter() - self.since),
            "seconds": self.seconds,
        }

    def begin_interval(self) -> None:
        """Losses and speed are counted anew after a report."""
        self.losses, self.episodes, self.since = [], 0, time.perf_counter()

    def note_before_end(self, reported: bool) -> None:
        """Keep what the validation at a run's end changes, for a run of more steps, which has none at this step.

        `reported`: whether that one has a report here nevertheless.
        """
        curve = [*self.curve, self.measure()] if reported else list(self.curve)
        losses = [] if reported else [loss.item() for loss in self.losses]
        at = {"best": self.best_miou, "curve": curve, "losses": losses, "pending": False}
        self.before_end = {"best": self.best, "at": at}

    def state_dict(self) -> dict:
        """What a resumed run needs, as `load_state_dict` takes it: plain tensors and numbers."""
        return {
            "training": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "best": self.best,
            "before_end": self.before_end,
            "at": {
                "step": self.step,
                "seconds": self.seconds,
                "best": self.best_miou,
                "curve": self.curve,
                "losses": [loss.item() for loss in self.losses],
                "pending": self.validation_due,
                "starts": self.starts,
            },
        }

    def load_state_dict(self, saved: dict) -> None:
        """Go on from a checkpoint; parts that older ones have not stay as they are."""
        self.model.load_state_dict(today_names(saved["training"]))
        self.average.load_state_dict(today_names(saved["average"]))
        # whatever the checkpoint was written with, on another device or by an earlier version
        way = {name: self.optimiser.defaults[name] for name in ("fused", "foreach")}
        groups = [group | way for group in saved["optimiser"]["param_groups"]]
        self.optimiser.load_state_dict(saved["optimiser"] | {"param_groups": groups})
        self.schedule.load_state_dict(saved["schedule"])
        at, device = saved["at"], next(self.model.parameters()).device
        self.best = saved.get("best")
        self.step, self.seconds, self.best_miou, self.curve = at["step"], at["seconds"], at["best"], at["curve"]
        self.losses = list(torch.tensor(at.get("losses", []), device=device))
        self.validation_due, self.starts = at.get("pending", False), at.get("starts", [])
        self._started = time.perf_counter() - self.seconds


def checkpoint(model: LabelAnything | Hybrid, config: TrainConfig, store: FeatureStore, step: int) -> dict:
    """What evaluation and prediction need: the model, the fold it has not seen, the features it was trained on."""
    made_by = store.info.settings.model_dump(include={"backbone", "weights", "image_size", "preprocessing", "layer"})
    features = made_by | {"weights_digest": store.info.weights_digest, "grid": list(store.info.grid)}
    origin = {"fold": config.fold, "store": store.key, "step": step, "train_config": config.model_dump_json()}
    return save_state(model) | origin | {"features": features}
