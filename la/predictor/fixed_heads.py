"""The heads with a fixed number of classes and supports, for `torch.export` and ONNX: features in, logits out.

What a model keeps of supports is an input, so that one exported file serves any classes. LA takes their prototypes; the
hybrid what it compares queries with, of one support for each pair of class and shot, pairs of a class together, so that
its file serves any classes shown on as many photos.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from la.errors import InputError
from la.model.hybrid import Hybrid
from la.model.label_anything import LabelAnything
from la.model.matching import Annotated, keys_of
from la.predictor.encoded_supports import Learned, Matched, Prototypes


class LabelAnythingHeads(nn.Module):
    """query (1, h, w, Dv), prototypes (1, C, D) -> logits (1, C, 4h, 4w), slot 0 the background."""

    def __init__(self, model: LabelAnything, ways: int):
        super().__init__()
        self.model = model
        self.register_buffer("slots", torch.ones(1, ways + 1, dtype=torch.bool), persistent=False)

    def forward(self, query: Tensor, prototypes: Tensor) -> Tensor:
        return self.model.decode(query, prototypes, self.slots)


class HybridHeads(nn.Module):
    """query (1, h, w, Dv), and of P = ways * shots supports the rest of `la.model.matching.Annotated`: sums (2, P, Dv),
    keys (P, m, Dv), weight (P, m) and mass (m,) -> logits (1, C, 4h, 4w), slot 0 the background.
    """

    def __init__(self, model: Hybrid, ways: int, shots: int):
        super().__init__()
        self.model = model
        self.register_buffer("slots", torch.ones(1, ways + 1, dtype=torch.bool), persistent=False)
        self.register_buffer("slot", torch.arange(1, ways + 1).repeat_interleave(shots), persistent=False)
        self.register_buffer("photo", torch.arange(ways * shots), persistent=False)

    def forward(self, query: Tensor, sums: Tensor, keys: Tensor, weight: Tensor, mass: Tensor) -> Tensor:
        supports = Annotated(self.slot, self.photo, weight, mass, sums, keys)
        return self.model.decode(query, self.model.matching.match(query, self.slots, [supports]), self.slots)


def heads_of(model: LabelAnything | Hybrid, ways: int, shots: int = 1) -> LabelAnythingHeads | HybridHeads:
    """The heads for so many classes; `shots` of each count for the hybrid alone. In evaluation mode on the CPU."""
    heads = HybridHeads(model, ways, shots) if isinstance(model, Hybrid) else LabelAnythingHeads(model, ways)
    return heads.cpu().eval()


def heads_inputs(learned: Learned) -> dict[str, Tensor]:
    """What the heads take beside the query, of a support set that was learned.

    Raises InputError where the hybrid's classes differ in their number of shots, which are fixed in a file.
    """
    if isinstance(learned, Prototypes):
        return {"prototypes": learned.prototypes.cpu()}
    assert isinstance(learned, Matched)
    supports = learned.annotated
    shots = supports.slot.bincount(minlength=len(learned.classes) + 1)[1:]
    if (shots != shots[0]).any():
        raise InputError(
            f"the classes have {', '.join(map(str, shots.tolist()))} supports; exported heads of the hybrid take as "
            "many of each. Choose with shots, or annotate as many photos for each."
        )
    order = supports.slot.argsort(stable=True)
    keys, weight = supports.keys[supports.photo[order]], supports.weight[order]
    tensors = {"sums": supports.sums[:, order], "keys": keys, "weight": weight, "mass": supports.mass}
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def example_inputs(
    heads: LabelAnythingHeads | HybridHeads, grid: tuple[int, int], keys: int | None = None
) -> dict[str, Tensor]:
    """Random inputs of the right shapes for feature maps of this grid, which exporting traces.

    `keys` is how many the hybrid has of each support, by default where each shot is a photo of its own.
    """
    config, (h, w) = heads.model.config, grid
    query = torch.randn(1, h, w, config.channels)
    if isinstance(heads, LabelAnythingHeads):
        return {"query": query, "prototypes": torch.randn(1, heads.slots.shape[1], config.dim)}
    pairs = len(heads.slot)
    keys = keys or keys_of(pairs, grid)
    return {
        "query": query,
        "sums": torch.randn(2, pairs, config.channels),
        "keys": nn.functional.normalize(torch.randn(pairs, keys, config.channels), dim=-1),
        "weight": torch.rand(pairs, keys),
        "mass": torch.ones(keys),
    }


def export_onnx(heads: LabelAnythingHeads | HybridHeads, inputs: dict[str, Tensor], path: Path) -> None:
    """One ONNX file with named inputs of these shapes and the output `logits`; InputError where onnx is missing."""
    try:
        import onnxscript  # noqa: F401  torch's exporter needs it and says so less clearly
    except ImportError as error:
        raise InputError("ONNX export needs more packages: pip install 'label-anything[export]'.") from error
    names = {"input_names": list(inputs), "output_names": ["logits"]}
    torch.onnx.export(heads, tuple(inputs.values()), dynamo=True, verbose=False, **names).save(path)
