"""Folds as data: which classes of a data set stay unseen in training (paper section 5.1)."""

from collections.abc import Mapping
from typing import Literal

from la.errors import InputError

FOLDS = 4
FoldLists = Literal["interleaved", "contiguous"]
# PASCAL-5i, by COCO's names of VOC's classes.
PASCAL_5I = (
    ("airplane", "bicycle", "bird", "boat", "bottle"),
    ("bus", "car", "cat", "chair", "cow"),
    ("dining table", "dog", "horse", "motorcycle", "person"),
    ("potted plant", "sheep", "couch", "train", "tv"),
)


def fold_classes(
    categories: Mapping[int, str], fold: int, lists: FoldLists = "interleaved"
) -> tuple[list[int], list[int]]:
    """(seen, unseen) category ids of a fold.

    `categories` maps ids to names, in any order. Where they are exactly VOC's twenty classes, by COCO's names, the
    folds are those of PASCAL-5i. Of others, COCO-20i among them, a fold leaves out a quarter by position: "interleaved"
    fold, fold + 4, ...; "contiguous" a block. Raises InputError for a fold outside 0-3.
    """
    if not 0 <= fold < FOLDS:
        raise InputError(f"fold is {fold}; COCO-20i and PASCAL-5i have folds 0 to {FOLDS - 1}. Choose one of them.")
    ordered = sorted(categories)
    if {name for names in PASCAL_5I for name in names} == set(categories.values()):
        unseen = [c for c in ordered if categories[c] in PASCAL_5I[fold]]
    elif lists == "contiguous":
        size = -(-len(ordered) // FOLDS)
        unseen = ordered[fold * size : (fold + 1) * size]
    else:
        unseen = ordered[fold::FOLDS]
    return [c for c in ordered if c not in set(unseen)], unseen
