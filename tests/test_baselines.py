"""The prototype baseline on a case worked by hand."""

import torch

from la.baselines import prompt_coverage, prototype
from la.batch import pack
from la.episodes import Episode, Pair

OBJECT, GROUND, THIRD = torch.eye(3)


def half(first, second):
    """(4, 4, 3): the left half is one feature, the right half the other."""
    return torch.cat((first.expand(4, 2, 3), second.expand(4, 2, 3)), 1)


IMAGES = {1: half(OBJECT, GROUND), 2: half(GROUND, OBJECT), 3: half(THIRD, GROUND)}
LEFT = torch.zeros(16, 16)
LEFT[:, :8] = 1


def batch_of(*pairs, classes=(5,), supports=(1,)):
    episode = Episode(0, classes, 2, supports, pairs)
    return pack((episode,), lambda ids: torch.stack([IMAGES[i] for i in ids]), lambda *_: LEFT, lambda _: (40, 40))


def test_mask_prompt_finds_the_object_where_it_is_in_the_query():
    batch = batch_of(Pair(0, 0, (1,), (), ()))
    logits = prototype(batch)
    assert logits.shape == (1, 2, 4, 4)
    assert (logits.argmax(1)[0] == torch.tensor([[0, 0, 1, 1]])).all()
    torch.testing.assert_close(logits[0, 1, 0], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(logits[0, 0, 0], torch.tensor([1.0, 1.0, 0.0, 0.0]))


def test_boxes_and_points_cover_the_cells_they_name():
    box = prompt_coverage(batch_of(Pair(0, 0, (), (), ((0.0, 0.0, 20.0, 10.0),))))
    assert box[1].nonzero().tolist() == [[0, 0], [0, 1]]
    point = prompt_coverage(batch_of(Pair(0, 0, (), ((35.5, 5.5, 1), (5.5, 35.5, 0)), ())))
    assert point[1].nonzero().tolist() == [[0, 3]], "a negative point covers nothing"
    assert box[0].sum() == 0, "the background has no prompts"


def test_two_classes_are_told_apart():
    pairs = (Pair(0, 0, (1,), (), ()), Pair(1, 1, (1,), (), ()))
    logits = prototype(batch_of(*pairs, classes=(5, 6), supports=(1, 3)))
    assert (logits.argmax(1)[0] == torch.tensor([[0, 0, 1, 1]])).all()
