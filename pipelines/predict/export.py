"""The heads of a checkpoint to a file for other programs, with what they know of saved classes beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from la.errors import InputError
from la.predictor.checkpoint import read_checkpoint
from la.predictor.encoded_supports import learn
from la.predictor.fixed_heads import example_inputs, export_onnx, heads_inputs, heads_of
from la.predictor.support_set import merged
from pipelines.predict.support_files import saved_classes
from pipelines.workspace import write_whole


@dataclass(frozen=True)
class ExportReport:
    """What was written, and by how much the file's logits differ from the model's on the same random input."""

    heads: Path
    classes: Path | None
    difference: float | None  # None: onnxruntime is not installed


def export_heads(
    checkpoint: str,
    out: Path,
    ways: int | None = None,
    shots: int = 1,
    prototypes: Sequence[Path] = (),
    grid: int | None = None,
) -> ExportReport:
    """Write the heads as .onnx or, by torch.export, .pt2; `grid` is the side of feature maps, where it is not known.

    With saved classes, `ways` and `shots` are theirs, and what the heads take of them goes into an .npz of the same
    name: the inputs beside the query, and `classes`, the names. Raises InputError for an ending, a checkpoint or saved
    classes that cannot be used, and where the number of classes is not said.
    """
    if out.suffix not in (".onnx", ".pt2"):
        raise InputError(f"--out {out}: expected .onnx or .pt2 as its ending.")
    known = read_checkpoint(checkpoint)
    kept, names = {}, ()
    if prototypes:
        supports = merged(saved_classes(prototypes, known))
        learned = learn(known.model, supports, torch.device("cpu"))
        kept, names = heads_inputs(learned), learned.classes
        ways, shots = len(names), max(supports.shots.values())
        grid = supports.supports[0].features.shape[0]
    if ways is None:
        raise InputError("nothing says how many classes the heads are for: pass --ways or --prototypes.")
    if grid is None and "grid" not in (known.features or {}):
        raise InputError("the checkpoint does not say how large its feature maps are. Pass --grid, their side.")
    side = grid or known.features["grid"][0]
    heads = heads_of(known.model, ways, shots)
    keys = kept["keys"].shape[1] if "keys" in kept else None
    # traced with the first numbers, held against the model on others: what a trace took for constant shows
    traced, inputs = (example_inputs(heads, (side, side), keys) for _ in range(2))
    if out.suffix == ".pt2":
        with torch.no_grad():
            program = torch.export.export(heads, tuple(traced.values()))
        write_whole(out, lambda temporary: _saved(program, temporary))
        module = program.module()
        difference = float((module(*inputs.values()) - heads(**inputs)).abs().max())
    else:
        write_whole(out, lambda temporary: export_onnx(heads, traced, temporary))
        difference = _onnx_difference(heads, inputs, out)
    if not names:
        return ExportReport(out, None, difference)
    arrays = {name: tensor.numpy() for name, tensor in kept.items()} | {"classes": np.array(names)}
    write_whole(out.with_suffix(".npz"), lambda temporary: _npz(temporary, arrays))
    return ExportReport(out, out.with_suffix(".npz"), difference)


def _saved(program: torch.export.ExportedProgram, path: Path) -> None:
    with open(path, "wb") as file:
        torch.export.save(program, file)


def _npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with open(path, "wb") as file:  # savez would add an ending to the name
        np.savez(file, **arrays)


@torch.inference_mode()
def _onnx_difference(heads: torch.nn.Module, inputs: dict[str, torch.Tensor], path: Path) -> float | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    found = onnxruntime.InferenceSession(path).run(None, {name: x.numpy() for name, x in inputs.items()})[0]
    return float(np.abs(found - heads(**inputs).numpy()).max())
