"""The end of a training whose numbers are no longer finite, with what the user can do about it."""

import torch

from la.errors import Diverged
from pipelines.training.prepare import Prepared
from pipelines.training.state import TrainState
from pipelines.training.step_batches import photos_of_step

LISTED = 32  # images at most in the message


def check_finite(prepared: Prepared, state: TrainState, world: int) -> None:
    """Raises Diverged where a step since the last check had a loss or a gradient that is not finite.

    It waits for the GPU, so it is asked at reports, and before a checkpoint is written: none is of after such a step.
    """
    checked = torch.stack(state.unchecked).cpu() if state.unchecked else torch.empty(0, 2)
    state.unchecked = []
    bad = (~checked.isfinite()).any(1).nonzero().flatten()
    if not len(bad):
        return
    before, (loss, norm) = state.step - len(checked) + int(bad[0]), checked[bad[0]].tolist()
    config, sources = prepared.config, list(zip(prepared.shards, prepared.builders, strict=True))
    builder, photos = photos_of_step(config, sources, world, before)
    named = [f"{photo} ({builder.dataset.images[photo].file_name})" for photo in photos]
    faulty = [n for n, photo in enumerate(photos) if not builder.store.read_batch([photo]).isfinite().all()]
    if faulty:
        advice = (
            f"The features of image {', '.join(named[n] for n in faulty)} are not finite: run `python cli.py verify "
            "--repair`, then train again"
        )
    else:
        advice = (
            f"Their features are finite. Lower --lr, which is {config.lr:g}, or pass --clip, such as 1, for a run of "
            "its own; `python cli.py verify` checks the store"
        )
    raise Diverged(
        f"Training diverged: step {before + 1} has the loss {loss:g} and gradients of the norm {norm:g}. Its images: "
        f"{', '.join(named[:LISTED])}{', ...' if named[LISTED:] else ''}. {advice}. The checkpoints in "
        f"{prepared.run_dir} are of earlier steps."
    )
