"""Seconds and peak memory of one method on one episode, measured in a process of its own.

On the CPU memory is resident memory, which only a fresh process starts with nothing of other methods in; on CUDA it is
what torch has allocated. Three states are told apart: libraries and model loaded and warmed up; the episode loaded
too, as features or, with the backbone, as photos; and the peak while the method runs.
"""

import ctypes
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from la.device import autocast, pick_device
from la.episodes.batch import EpisodeBatch
from la.episodes.sampling import Episode
from la.errors import InputError
from la.evaluation.baselines import BASELINES
from la.model.hybrid import Hybrid
from la.model.label_anything import build, preset
from pipelines.config import EvaluateConfig
from pipelines.episodes.batches import BatchBuilder
from pipelines.episodes.episode_shards import draw, evaluation_plan, repeated
from pipelines.evaluation.methods import load_checkpoint
from pipelines.remote_path import path_or_uri
from pipelines.store.reader import FeatureStore

WAYS = 5  # of table 2
SPLIT = "train"  # has the most photos; nothing is scored

Chunks = Callable[[], Iterator[EpisodeBatch]]  # a new pass over an episode's supports at each call
Run = Callable[[Chunks, Tensor], Tensor]


@dataclass(frozen=True)
class Cell:
    """One cell of the table: what is measured, and how."""

    store: Path
    method: str  # "la", "hybrid" or the name of a baseline
    shots: int
    backbone: bool  # from photos; else from features
    preset: str = "official"  # of LA, with random weights
    checkpoint: Path | None = None  # of LA, in path_or_uri of the preset
    weights: Path | None = None  # of the backbone
    fold: int = 0
    repeats: int = 5
    supports_at_once: int = 1  # of LA and the hybrid; photos through the backbone, for all methods
    device: str = "auto"
    threads: int | None = None


@dataclass(frozen=True)
class Measured:
    """Seconds are the median of the repeats; MB are 1e6 bytes."""

    device: str
    seconds: float
    drawn_shots: int  # different photos of a class; repeated up to the cell's shots
    ready_mb: float  # resident with libraries and model, after a warm-up on one class and one shot
    loaded_mb: float  # resident with the episode as well
    peak_mb: float
    episode_mb: float  # bytes of its features, or of its photos
    memory_from: str  # VmHWM, ru_maxrss (a high-water mark that loading may have set) or CUDA's allocator


@torch.inference_mode()
def measure(cell: Cell) -> Measured:
    """Raises InputError for a store, checkpoint, backbone or device that cannot be used, and for too few photos."""
    if cell.threads:
        torch.set_num_threads(cell.threads)
    torch.manual_seed(0)
    device, store = pick_device(cell.device), FeatureStore(cell.store)
    run, mask_px = _method(cell, store, device)
    (small, _), (episode, drawn) = _episode(store, cell.fold, 1, 1), _episode(store, cell.fold, WAYS, cell.shots)
    memory = Memory(device)
    with autocast(device):
        run(*_load(cell, small, mask_px, device)[:2])  # brings in the code and buffers that libraries load when used
        ready = memory.now()
        chunks, query, held = _load(cell, episode, mask_px, device)
        loaded = memory.now()
        memory.reset()
        run(chunks, query)
        peak = memory.peak()
        memory.keep_freed()
        run(chunks, query)
        seconds = []
        for _ in range(cell.repeats):
            started = time.perf_counter()
            run(chunks, query).cpu()  # waits for a GPU
            seconds.append(time.perf_counter() - started)
    mb = (value / 1e6 for value in (ready, loaded, peak, held))
    return Measured(str(device), statistics.median(seconds), drawn, *mb, memory.source)


def _method(cell: Cell, store: FeatureStore, device: torch.device) -> tuple[Run, int | None]:
    """What to call on chunks (one for a baseline) and query, and the side of LA's mask prompts in pixels."""
    encode = _encoder(cell, store, device)

    def baseline(chunks: Chunks, query: Tensor) -> Tensor:
        batch = next(chunks())
        return BASELINES[cell.method](replace(batch, support=encode(batch.support), query=encode(query)))

    if cell.method in BASELINES:
        return baseline, None
    if cell.method == "hybrid":
        model = build(preset("hybrid", channels=store.info.channels)).to(device).eval()
    elif cell.checkpoint:
        config = EvaluateConfig(
            workspace=cell.store.parents[1], checkpoint=cell.checkpoint, fold=cell.fold, classes="seen", split=SPLIT
        )
        model, _ = load_checkpoint(config, store, device)
    else:
        model = build(preset(cell.preset, channels=store.info.channels)).to(device).eval()

    def hybrid(chunks: Chunks, query: Tensor) -> Tensor:
        query = encode(query)
        slots = torch.ones(1, WAYS + 1, dtype=torch.bool, device=device)
        seen = model.matching(replace(chunk, query=query, support=encode(chunk.support)) for chunk in chunks())
        return model.decode(query, seen, slots[:, : seen.shape[1]])

    if isinstance(model, Hybrid):
        return hybrid, model.config.mask_px

    def la(chunks: Chunks, query: Tensor) -> Tensor:
        prototypes = model.prototypes(replace(chunk, support=encode(chunk.support)) for chunk in chunks())
        slots = torch.ones(prototypes.shape[:2], dtype=torch.bool, device=device)
        return model.decode(encode(query), prototypes, slots)

    return la, model.config.mask_px


def _encoder(cell: Cell, store: FeatureStore, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Photos (n, 3, S, S) to features (n, h, w, Dv), `supports_at_once` at a time; or features to themselves."""
    if not cell.backbone:
        return lambda features: features
    from la.backbone.vit import load_backbone  # here, as its libraries take memory that other cells do not need

    backbone = load_backbone(store.info.backbone, store.info.image_size, cell.weights, device)
    return lambda photos: torch.cat([backbone.encode(part) for part in photos.split(cell.supports_at_once)])


def _episode(store: FeatureStore, fold: int, ways: int, shots: int) -> tuple[Episode, int]:
    """An episode of seen classes, and how many of its shots are different photos; the others repeat them."""
    for few in range(shots, 0, -1):
        config = EvaluateConfig(
            workspace=store.path.parents[1], fold=fold, ways=ways, shots=few, classes="seen", split=SPLIT
        )
        if shots % few == 0:
            try:
                return repeated(draw(evaluation_plan(config, 0), store, 0, 0, 1)[0], shots // few), few
            except InputError:
                if few == 1:
                    raise
    raise AssertionError("one shot divides any number")


def _load(cell: Cell, episode: Episode, mask_px: int | None, device: torch.device) -> tuple[Chunks, Tensor, int]:
    """The episode's chunks, its query, and the bytes of its features, or photos, on the device.

    These are there once whatever the method, so that memory beyond them compares: LA's chunks are taken out of them as
    it goes, prompts and all; a baseline's batch is packed before. No mapped shard of the store stays in memory.
    """
    held = _Held(cell.store)
    held.hold(episode, (_Photos if cell.backbone else FeatureStore)(cell.store), device)
    builder, query, size = BatchBuilder(held, SPLIT, mask_px), held.table[:1], held.table.nbytes
    if cell.method not in BASELINES:
        return lambda: (c.to(device) for c in builder.chunks([episode], cell.supports_at_once)), query, size
    batch = builder.pack([episode]).to(device)
    return lambda: iter([batch]), batch.query, size


class _Held(FeatureStore):
    """A store that gives what it holds in memory of one episode."""

    def hold(self, episode: Episode, store: FeatureStore, device: torch.device) -> None:
        ids = [episode.query, *episode.supports]
        self.table = store.read_batch(ids).to(device)
        self.row = {image_id: row for row, image_id in enumerate(ids)}

    def read_batch(self, image_ids: Sequence[int]) -> Tensor:
        return self.table[[self.row[i] for i in image_ids]]

    read_encoded = read_batch


class _Photos(FeatureStore):
    """Photos of a store's COCO folder in path_or_uri of their features."""

    def read_batch(self, image_ids: Sequence[int]) -> Tensor:
        """(n, 3, S, S) uint8."""
        from la.data.photos import read_photo

        folder = path_or_uri(self.info.coco_dir) / self.info.splits[SPLIT].name
        images = [self.dataset(SPLIT).images[i] for i in image_ids]
        size = self.info.image_size
        return torch.stack([read_photo(folder / i.file_name, size, (i.height, i.width)) for i in images])

    read_encoded = read_batch


TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
MOST_KEPT = 32 * 2**20  # bytes; where the threshold, which follows what is freed, ends up by itself


class Memory:
    """Memory of this process in bytes, now and at most since `reset`.

    On the CPU, tensors that are freed go back to the system at once, as long as `keep_freed` is not called: how much
    glibc keeps otherwise differs by half from run to run.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.source = "CUDA's allocator" if device.type == "cuda" else "VmHWM"
        self._glibc("mallopt", MMAP_THRESHOLD, 128 * 2**10)

    def keep_freed(self) -> None:
        """As fast as usual again: every large tensor's pages are cleared by the system otherwise."""
        self._glibc("mallopt", MMAP_THRESHOLD, MOST_KEPT)
        self._glibc("mallopt", TRIM_THRESHOLD, 2 * MOST_KEPT)

    def _glibc(self, name: str, *arguments: int) -> None:
        call = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None  # musl has no such calls
        if call:
            call(*arguments)

    def now(self) -> int:
        """What is in use: what was freed is given back first."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.memory_allocated(self.device)
        self._glibc("malloc_trim", 0)
        return _status("VmRSS") or _most_resident()

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # lowers VmHWM to VmRSS, see proc(5)
        except OSError:
            self.source = "ru_maxrss"

    def peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return (_status("VmHWM") if self.source == "VmHWM" else None) or _most_resident()


def _status(field: str) -> int | None:
    """Bytes of a field of /proc/self/status; None where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def _most_resident() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # bytes there, kilobytes elsewhere
