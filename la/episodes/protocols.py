"""Evaluation protocols as data: numbers of the literature compare only within one of them."""

from dataclasses import dataclass
from typing import Literal

from la.data.folds import FoldLists
from la.errors import InputError


@dataclass(frozen=True)
class Protocol:
    """How episodes are drawn and scored. The supports of a class are drawn uniformly from the images that show it."""

    name: str
    followed_by: str  # methods whose numbers were measured so
    folds: FoldLists  # of data sets of other classes than VOC's
    query: str  # how it is drawn: a name in `la.episodes.query_draws`
    seeds: int
    episodes: int  # of each seed
    min_area: int = 32 * 32  # pixels of a class that an image must show to be its query or support
    truth: Literal["original", "network"] = "original"  # the ground truth's size: the photo's or the backbone's input


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("la", "Label Anything", "interleaved", "class", 5, 1000),
        Protocol("hsnet", "HSNet, VAT, DCAMA", "interleaved", "class", 1, 1000, truth="network"),
        Protocol("pfenet", "PFENet, BAM, FPTrans", "interleaved", "image", 5, 1000, min_area=2 * 32 * 32),
        Protocol("panet", "PANet, PPNet, MFNet", "contiguous", "run", 5, 1000, truth="network"),
        Protocol("large", "none: for small differences", "interleaved", "class", 1, 10_000),
    )
}


def protocol_of(name: str) -> Protocol:
    """Raises InputError for an unknown name."""
    if name not in PROTOCOLS:
        raise InputError(f"protocol {name} is unknown. Choose one of {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]
