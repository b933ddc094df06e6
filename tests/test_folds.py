"""Folds against the published lists."""

import pytest

from la.data.folds import PASCAL_5I, fold_classes
from la.errors import InputError

# COCO's category ids leave gaps: 80 of 1..90.
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
COCO = {i: f"class {i}" for i in COCO_IDS}
FOLD_0 = {
    1: "person", 5: "airplane", 9: "boat", 14: "parking meter", 18: "dog", 22: "elephant", 27: "backpack",
    33: "suitcase", 37: "sports ball", 41: "skateboard", 46: "wine glass", 50: "spoon", 54: "sandwich", 58: "hot dog",
    62: "chair", 67: "dining table", 74: "mouse", 78: "microwave", 82: "refrigerator", 87: "scissors",
}  # fmt: skip
VOC_IDS = [1, 2, 3, 4, 5, 6, 7, 9, 16, 17, 18, 19, 20, 21, 44, 62, 63, 64, 67, 72]
VOC_NAMES = """person bicycle car motorcycle airplane bus train boat bird cat dog horse sheep cow bottle chair couch
potted_plant dining_table tv""".replace("_", "\0").split()
VOC = {i: name.replace("\0", " ") for i, name in zip(VOC_IDS, VOC_NAMES, strict=True)}


def test_fold_0_is_the_published_list():
    assert fold_classes(COCO, 0)[1] == list(FOLD_0)


@pytest.mark.parametrize("fold", range(4))
def test_unseen_classes_are_every_fourth_by_position(fold):
    seen, unseen = fold_classes(dict(reversed(COCO.items())), fold)
    assert unseen == [COCO_IDS[fold + 4 * k] for k in range(20)]
    assert sorted(seen + unseen) == COCO_IDS
    assert len(seen) == 60


@pytest.mark.parametrize("fold", range(4))
def test_contiguous_folds_are_blocks_of_twenty(fold):
    assert fold_classes(COCO, fold, "contiguous")[1] == COCO_IDS[20 * fold : 20 * fold + 20]


@pytest.mark.parametrize("categories", [COCO, VOC])
@pytest.mark.parametrize("lists", ["interleaved", "contiguous"])
def test_every_class_is_unseen_in_one_fold(categories, lists):
    assert sorted(c for fold in range(4) for c in fold_classes(categories, fold, lists)[1]) == sorted(categories)


@pytest.mark.parametrize("fold", range(4))
def test_the_classes_of_voc_have_the_folds_of_pascal_5i(fold):
    seen, unseen = fold_classes(VOC, fold)
    assert {VOC[c] for c in unseen} == set(PASCAL_5I[fold])
    assert len(seen) == 15


@pytest.mark.parametrize("fold", [-1, 4])
def test_a_fold_that_is_none_is_refused(fold):
    with pytest.raises(InputError, match=f"fold is {fold}; .* 0 to 3"):
        fold_classes(COCO, fold)
