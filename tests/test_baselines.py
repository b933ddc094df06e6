"""Methods without training: cases worked by hand, and what must not change any of them."""

import math

import pytest
import torch

from la.episodes.batch import pack
from la.episodes.coverage import prompt_coverage
from la.episodes.sampling import Episode, Pair
from la.evaluation.baselines import BASELINES, affinity, k_means, parts, prototype, ridge

OBJECT, GROUND, THIRD = torch.eye(3)


def half(first, second):
    """(4, 4, 3): the left half is one feature, the right half the other."""
    return torch.cat((first.expand(4, 2, 3), second.expand(4, 2, 3)), 1)


IMAGES = {1: half(OBJECT, GROUND), 2: half(GROUND, OBJECT), 3: half(THIRD, GROUND)}
IMAGES[4] = torch.cat((IMAGES[1][:2], IMAGES[3][:2]))  # on its left the object stands above the third feature
RIGHT_HALF = torch.tensor([[0, 0, 1, 1]])  # slots of a row of image 2, the query
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


every_method = pytest.mark.parametrize("method", BASELINES.values(), ids=BASELINES)


@every_method
@pytest.mark.parametrize(
    "prompts",
    [((1,), (), ()), ((), ((5.5, 5.5, 1),), ()), ((), (), ((0.0, 0.0, 20.0, 40.0),))],
    ids=("mask", "point", "box"),
)
def test_any_prompt_finds_the_object(method, prompts):
    assert (method(batch_of(Pair(0, 0, *prompts))).argmax(1)[0] == RIGHT_HALF).all()


@every_method
def test_either_of_two_shots_finds_the_object(method):
    logits = method(batch_of(Pair(0, 0, (1,), (), ()), Pair(1, 0, (1,), (), ()), supports=(3, 1)))
    assert (logits.argmax(1)[0] == RIGHT_HALF).all()


@every_method
@pytest.mark.parametrize("slot", [0, 1])
def test_two_classes_on_two_supports_are_told_apart(method, slot):
    pairs = (Pair(0, slot, (1,), (), ()), Pair(1, 1 - slot, (1,), (), ()))
    logits = method(batch_of(*pairs, classes=(5, 6), supports=(1, 3)))
    assert (logits.argmax(1)[0] == RIGHT_HALF * (1 + slot)).all()


@every_method
def test_a_class_whose_prompts_cover_no_cell_is_found_nowhere(method):
    logits = method(batch_of(Pair(0, 0, (), (), ((0.0, 0.0, 1.0, 1.0),))))
    assert logits.isfinite().all()
    assert (logits.argmax(1) == 0).all()


def test_parts_keep_two_looks_of_a_class_apart():
    batch = batch_of(Pair(0, 0, (1,), (), ()), supports=(4,))
    logits = parts(batch, sharpness=3.0)[0, :, 0]
    alike = math.log((math.exp(3) + 1) / 2) / 3  # cosine 1 to one of two parts, 0 to the other
    torch.testing.assert_close(logits[1], torch.tensor([0, 0, alike, alike]))
    torch.testing.assert_close(logits[0], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert alike > prototype(batch)[0, 1, 0, 3], "their mean is like neither: cosine 0.71"


def test_k_means_goes_to_the_weight_and_needs_no_more_tokens_than_parts():
    near = torch.nn.functional.normalize(torch.tensor([1.0, 0.2, 0.0]), dim=0)
    tokens, weight = torch.stack((OBJECT, near, GROUND, THIRD)), torch.tensor([3.0, 1.0, 1.0, 0.0])
    centres = k_means(tokens, weight, 2)
    torch.testing.assert_close(centres[0], torch.nn.functional.normalize(3 * OBJECT + near, dim=0))
    torch.testing.assert_close(centres[1], GROUND)
    torch.testing.assert_close(k_means(tokens, weight, 5).sum(0), OBJECT + near + GROUND)
    assert len(k_means(OBJECT.expand(4, 3), torch.ones(4), 3)) == 1, "equal tokens make one part"
    assert len(k_means(tokens, torch.zeros(4), 2)) == 0


def test_affinity_reads_the_coverage_of_what_looks_alike():
    probability = affinity(batch_of(Pair(0, 0, (1,), (), ())), temperature=0.5)[0, :, 0]
    alike = math.exp(2) / (math.exp(2) + 1)  # of the attention; the mask covers half, so the prior odds are 1
    torch.testing.assert_close(probability[1], torch.tensor([1 - alike, 1 - alike, alike, alike]))
    torch.testing.assert_close(probability.sum(0), torch.ones(4))


def test_affinity_does_not_lose_small_objects():
    probability = affinity(batch_of(Pair(0, 0, (), ((5.5, 5.5, 1),), ())), temperature=0.5)[0, 1, 0]
    read = math.exp(2) / (math.exp(2) + 1) / 8  # one of the eight cells that look alike is covered, one of 16 in all
    odds = read / (1 - read) * 15
    torch.testing.assert_close(probability[3], torch.tensor(odds / (1 + odds)))


def test_ridge_is_the_closed_form():
    logits = ridge(batch_of(Pair(0, 0, (1,), (), ())), penalty=0.5, background_bias=0.0)[0, :, 0]
    # two features with the constant, half the weight each: K = [[2, 1], [1, 2]], K (K + I)^-1 = [[5, 1], [1, 5]] / 8
    torch.testing.assert_close(logits[1], torch.tensor([0.125, 0.125, 0.625, 0.625]))
    torch.testing.assert_close(logits[0], torch.tensor([0.625, 0.625, 0.125, 0.125]))


def test_ridge_counts_slots_the_same_however_large():
    logits = ridge(batch_of(Pair(0, 0, (), (), ((0.0, 0.0, 20.0, 10.0),))), penalty=1e-4, background_bias=0.0)
    # the class's two cells show the object, and six of the background's 14: it weighs 1/2 to 1/2 * 6/14
    torch.testing.assert_close(logits[0, 1, 0, 3], torch.tensor(7 / 10), atol=2e-3, rtol=0)


def noise(images):
    return torch.stack([torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(i)) for i in images])


def noisy_batch(*episodes):
    return pack(episodes, noise, lambda *_: LEFT, lambda _: (40, 40))


THREE = Episode(
    0,
    (5, 6, 7),
    2,
    (1, 3, 4, 5),
    (
        Pair(0, 0, (1,), (), ()),
        Pair(1, 0, (), ((5.5, 35.5, 1),), ()),
        Pair(1, 1, (), (), ((10.0, 0.0, 40.0, 20.0),)),
        Pair(2, 2, (), ((35.5, 35.5, 1), (5.5, 5.5, 0)), ()),
        Pair(3, 2, (1,), (), ()),
    ),
)
ONE = Episode(1, (6,), 8, (9,), (Pair(0, 0, (1,), (), ()),))


@every_method
@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1)])
def test_permuting_classes_permutes_logits(method, order):
    pairs = tuple(p._replace(slot=order.index(p.slot)) for p in THREE.pairs)
    permuted = THREE._replace(classes=tuple(THREE.classes[i] for i in order), pairs=pairs)
    expected = method(noisy_batch(THREE))[:, [0, *(1 + i for i in order)]]
    torch.testing.assert_close(method(noisy_batch(permuted)), expected)


@every_method
def test_batch_mates_change_nothing(method):
    together = method(noisy_batch(ONE, THREE))
    assert together.shape == (2, 4, 4, 4)
    torch.testing.assert_close(together[:1, :2], method(noisy_batch(ONE)))
    torch.testing.assert_close(together[1:], method(noisy_batch(THREE)))
    assert (together[0, 2:] == -1e4).all(), "slots that an episode does not have"


@every_method
def test_autocast_changes_nothing(method):
    batch = noisy_batch(THREE)
    with torch.autocast("cpu", torch.bfloat16):
        found = method(batch)
    assert torch.equal(found, method(batch))
