"""Operators of a training step: what a device is asked to do one by one, which takes longer than the work itself."""

import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from la.errors import InputError
from pipelines.bench.rates import made_up_store
from pipelines.bench.ratios import BenchResult
from pipelines.config import TrainConfig
from pipelines.training.loop import train_step
from pipelines.training.prepare import prepare
from pipelines.training.resume import LastCheckpoint, begin

BACKBONE, IMAGE_SIZE = "vit_base_patch16_224.mae", 480  # 30 x 30 tokens of 768 channels, as in the paper
# What a step dispatched with an optimiser, an average and a norm that go from parameter to parameter, and the share of
# it that a step may take.
BEFORE = {"paper": (2767, 0.5), "official": (6206, 0.5), "hybrid": (787, 0.6)}
ALLOCATING = {"detach_", "item", "lift_fresh", "resize_", "result_type", "set_", "_local_scalar_dense", "_unsafe_view"}
COMPOSED = "CompositeImplicitAutograd"


def bench_operators(names: tuple[str, ...] = tuple(BEFORE)) -> list[BenchResult]:
    """Operators in a step of each preset's recipe, averaged over its (B, N, K); the same on every run. On the CPU.

    Raises InputError for a preset without a recipe.
    """
    if unknown := set(names) - set(BEFORE):
        raise InputError(f"--preset {unknown.pop()} has no recipe to count. Choose one of {', '.join(BEFORE)}.")
    results = []
    with tempfile.TemporaryDirectory(prefix="bench-operators-") as folder:
        workspace = made_up_store(Path(folder), BACKBONE, IMAGE_SIZE)
        for name in names:
            before, bar = BEFORE[name]
            dispatched, kernels = step_operators(TrainConfig(workspace=workspace, preset=name, recipe=name))
            details = {"dispatched": dispatched, "computing": kernels, "before": before}
            results.append(BenchResult(f"operators: a step of {name}", dispatched / before, bar, "at most", details))
    return results


def step_operators(config: TrainConfig) -> tuple[float, float]:
    """(operators that a step dispatches, those that compute something), both without what operators call in turn.

    The first are those that Python and the backward pass call. Of these and all that they call, the second are the
    outermost that do the work themselves and make a kernel each on a GPU, no views. Means over one step of each
    (B, N, K), after one that is not counted.
    """
    config = config.model_copy(update={"device": "cpu", "train_batches": len(config.batches)})
    prepared = prepare(config)
    shards, builder, cpu = prepared.shards[0], prepared.builders[0], torch.device("cpu")
    state = begin(prepared, LastCheckpoint(prepared), cpu)
    for group in state.optimiser.param_groups:  # as on a GPU
        group.update(fused=True, foreach=None)
    counts = Counter()
    for group, (size, *_) in [(0, config.batches[0]), *enumerate(config.batches)]:
        drawn = shards.batch(group, 0)
        batch = list(range(size)), builder.pack(drawn), builder.truth(drawn)
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            state.advance(*train_step(state.model, state, iter([batch]), config, cpu))
        if state.step > 1:
            counts += operators(recorded)
    return tuple(counts[kind] / len(config.batches) for kind in ("dispatched", "computing"))


def operators(recorded: profile) -> Counter:
    """Of a profile, how many operators were dispatched and how many compute."""
    counts = Counter()
    for event in recorded.events():
        above, callers = event.cpu_parent, []
        while above is not None:
            callers.append(above.name)
            above = above.cpu_parent
        if event.name.startswith("aten::"):
            counts["dispatched"] += not any(name.startswith("aten::") for name in callers)
            counts["computing"] += computes(event.name) and not any(map(computes, callers))
    return counts


@cache
def computes(name: str) -> bool:
    """Whether an operator by its profiler's name does work itself: views, allocations and compositions do not."""
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"), None) if name.startswith("aten::") else None
    if packet is None or "empty" in name or name.removeprefix("aten::") in ALLOCATING:
        return False
    first = getattr(packet, packet.overloads()[0])
    return not first.is_view and not torch._C._dispatch_has_kernel_for_dispatch_key(first.name(), COMPOSED)
