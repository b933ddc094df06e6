"""The training loop, read from top to bottom; every worker runs it (paper sections 4.4 and 5.2)."""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from la.device import autocast, pick_device
from la.episodes.batch import EpisodeBatch
from la.evaluation.losses import focal_loss, iou_loss
from pipelines.config import TrainConfig
from pipelines.episodes.batches import BatchBuilder
from pipelines.evaluation.evaluate import score
from pipelines.evaluation.shared_work import predictor
from pipelines.runs.checkpoints import BEST, save, save_last
from pipelines.training.divergence import check_finite
from pipelines.training.optimiser import clip_gradients, update_average
from pipelines.training.prepare import Prepared
from pipelines.training.resume import LastCheckpoint, begin
from pipelines.training.state import TrainState, checkpoint
from pipelines.training.step_batches import pure_number, read_ahead
from pipelines.workspace import write_text

Report = Callable[[dict], None]
REPORT_EVERY = 10  # steps


@dataclass(frozen=True)
class Worker:
    """One process of those that train together, and how they act as one."""

    rank: int = 0
    world: int = 1
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model
    from_rank0: Callable[[int], int] = lambda value: value  # the value that rank 0 has
    stop_requested: Callable[[], bool] = lambda: False  # on rank 0
    # rank 0's answer for all ranks: asked when a step begins, so that it travels meanwhile, and taken at its end
    ask_rank0: Callable[[Callable[[], bool]], Callable[[], bool]] = lambda question: question


def train_loop(prepared: Prepared, worker: Worker, on_report: Report, last: LastCheckpoint | None = None) -> None:
    """Train from the last checkpoint on, which is read here unless it is given; rank 0 validates, saves and reports.

    Without `result.json` at its end, it was asked to stop.
    """
    config, run_dir = prepared.config, prepared.run_dir
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    state = begin(prepared, last or LastCheckpoint(prepared), device)
    if (first := worker.from_rank0(state.step)) != state.step:  # shared storage may show nodes older files for a while
        raise RuntimeError(f"{run_dir}: rank 0 goes on from step {first}, rank {worker.rank} from {state.step}")
    state.starts.append(state.step)
    model = worker.wrap(torch.compile(state.model) if config.compile else state.model)
    sources = list(zip(prepared.shards, prepared.builders, strict=True))
    batches = read_ahead(config, sources, worker.rank, worker.world, state.step)

    done = state.step >= config.steps and not state.validation_due
    while not done:
        stop = worker.ask_rank0(worker.stop_requested)
        validating = state.validation_due
        if not validating:
            loss, norm, episodes = train_step(model, state, batches, config, device)
            state.advance(loss, norm, episodes * worker.world)
        done = state.step == config.steps
        saving = done or state.step % config.checkpoint_every == 0
        if (saving or validating) and config.minutes is not None:
            done = bool(worker.from_rank0(done or state.seconds > 60 * config.minutes))
        validating = validating or done or state.step % config.val_every == 0
        state.validation_due = False
        if done and state.step % config.val_every:
            state.note_before_end(state.step % REPORT_EVERY == 0)
        if validating or state.step % REPORT_EVERY == 0:
            check_finite(prepared, state, worker.world)
            if worker.rank == 0:
                report(prepared, state, validating, device, worker.stop_requested, on_report)
            else:
                state.begin_interval()
        stopping = stop()
        if validating:  # which takes long, and which rank 0 leaves when it is asked to stop
            stopping = bool(worker.from_rank0(stopping or worker.stop_requested()))
        if saving or stopping:
            check_finite(prepared, state, worker.world)
        if worker.rank == 0 and (saving or stopping):
            write_text(run_dir / "curve.jsonl", "".join(json.dumps(point) + "\n" for point in state.curve))
            kept = checkpoint(state.average.module, config, prepared.store, state.step)
            save_last(run_dir, kept | state.state_dict())
        if stopping and (state.validation_due or not done):
            return
    if worker.rank == 0:
        metrics = {"seen_miou": state.best_miou, "train_seconds": state.seconds}
        digest = {"episodes_digest": prepared.episodes_digest, "starts": state.starts}
        write_text(run_dir / "result.json", json.dumps({"step": state.step, "metrics": metrics} | digest))


def train_step(
    model: nn.Module,
    state: TrainState,
    batches: Iterator[tuple[list[int], EpisodeBatch, Tensor]],
    config: TrainConfig,
    device: torch.device,
) -> tuple[Tensor, Tensor, int]:
    """One step of the optimiser on the next `accumulate` batches; returns loss, gradient norm and number of episodes.

    The loss is the mean of theirs. As they are of one size, that is the loss of all their episodes in one batch, but
    for class weights "log_batch", which go by the pixels of each batch. `positions` of the episodes in the step, over
    all batches and ranks, seed what is drawn for each (its rows of the token pool, section 4.2): so the number of
    workers changes nothing.
    """
    losses, episodes = [], 0
    state.optimiser.zero_grad(set_to_none=True)
    for left in reversed(range(config.accumulate)):
        positions, batch, truth = next(batches)
        batch, truth = batch.to(device), truth.to(device, non_blocking=True)
        if config.flips and state.step % 2:
            batch, truth = replace(batch, query=batch.query.flip(2)), truth.flip(-1)
        seeds = [pure_number(config.seed, state.step, position) for position in positions]
        # ranks exchange gradients once they are complete
        with model.no_sync() if left and hasattr(model, "no_sync") else nullcontext():
            with autocast(device):
                logits = model(batch, seeds)
            if config.loss == "iou":
                loss = iou_loss(logits, truth, batch.slots)
            else:
                loss = focal_loss(logits, truth, config.gamma, config.class_weights)
            (loss / config.accumulate).backward()
        losses.append(loss.detach())
        episodes += len(truth)
    norm = clip_gradients(model, config.clip)
    state.optimiser.step()
    state.schedule.step()
    update_average(state.average, state.model, config.ema)
    return torch.stack(losses).mean(), norm, episodes


def report(
    prepared: Prepared,
    state: TrainState,
    validating: bool,
    device: torch.device,
    stop_requested: Callable[[], bool],
    on_report: Report,
) -> None:
    """Report, after a validation where one is due; a validation that was asked to stop stays due."""
    metrics = state.measure()
    if validating:
        builder = BatchBuilder(prepared.store, "val", prepared.shape.mask_px)
        predict = predictor(state.average.module, builder, device)
        scores = score(predict, prepared.validation, builder, device, stop=stop_requested)
        if scores is None:
            state.validation_due = True
            return
        metrics["seen_miou"] = scores.miou()
        if metrics["seen_miou"] > state.best_miou:
            state.best_miou = metrics["seen_miou"]
            state.best = checkpoint(state.average.module, prepared.config, prepared.store, state.step)
            save(prepared.run_dir / BEST, state.best)
    state.curve.append(metrics)
    on_report(metrics)
    state.begin_interval()
