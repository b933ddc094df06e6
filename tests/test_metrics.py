"""mIoU against masks worked by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from la.data.coco import IGNORED
from la.evaluation.metrics import FewShotIoU, interval_of, resampled_means, score_episode


def test_iou_by_hand():
    scores = FewShotIoU()
    truth = torch.tensor([[1, 1, 0, 0]])
    scores.add(torch.tensor([[1, 0, 1, 0]]), truth, (7,))
    assert scores.miou() == pytest.approx(100 / 3)  # 1 hit, union 3
    scores.add(truth, truth, (7,))
    assert scores.miou() == pytest.approx(100 * 3 / 5), "accumulated over episodes, not averaged"
    scores.add(torch.tensor([[0, 0, 0, 0]]), truth, (9,))
    assert scores.per_class() == pytest.approx({7: 60.0, 9: 0.0})
    assert scores.miou() == pytest.approx(30)


def test_ignored_pixels_count_as_nothing():
    scores = FewShotIoU()
    scores.add(torch.tensor([[1, 1, 1, 0]]), torch.tensor([[1, IGNORED, IGNORED, 0]]), (3,))
    assert scores.miou() == 100


def test_a_swapped_pair_of_classes_scores_nothing():
    scores = FewShotIoU()
    truth = torch.tensor([[1, 1, 2, 2, 0]])
    scores.add(torch.tensor([[2, 2, 1, 1, 0]]), truth, (4, 5))
    assert scores.miou() == 0


@given(st.integers(1, 20), st.integers(0, 1000))
def test_a_perfect_prediction_scores_100_for_any_number_of_classes(ways, seed):
    generator = torch.Generator().manual_seed(seed)
    classes = (1 + torch.randperm(90, generator=generator)[:ways]).tolist()
    truth = torch.randint(0, ways + 1, (12, 12), generator=generator)
    truth.view(-1)[: ways + 1] = torch.arange(ways + 1)
    scores = FewShotIoU()
    scores.add(truth, truth, classes)
    assert scores.miou() == 100
    assert len(scores.per_class()) == ways


def test_scores_add_up():
    one, other, both = FewShotIoU(), FewShotIoU(), FewShotIoU()
    truth, guess = torch.tensor([[1, 1, 0]]), torch.tensor([[1, 0, 0]])
    one.add(guess, truth, (1,))
    other.add(truth, truth, (1,))
    both.add(guess, truth, (1,))
    both.add(truth, truth, (1,))
    one += other
    assert vars(one) == vars(both)


def test_fb_iou_by_hand():
    scores = FewShotIoU()
    # foreground: 2 of 3 pixels of the union, though the classes are swapped; background: 1 of 2
    scores.add(torch.tensor([[2, 1, 1, 0]]), torch.tensor([[1, 2, 0, 0]]), (4, 5))
    assert scores.fb_iou() == pytest.approx((100 * 2 / 3 + 100 / 2) / 2)
    assert scores.miou() == 0
    scores.add(torch.tensor([[1, 1, 0, 0]]), torch.tensor([[1, 1, 0, IGNORED]]), (4,))
    assert scores.fb_iou() == pytest.approx((100 * 4 / 5 + 100 * 2 / 3) / 2), "accumulated over episodes"


def test_the_interval_holds_the_mean_and_shrinks_with_episodes():
    def scores(count):
        chance, made = np.random.default_rng(1), FewShotIoU()
        for _ in range(count):
            guess = torch.from_numpy(chance.integers(0, 2, (8, 8)))
            made.add(guess, torch.from_numpy(chance.integers(0, 2, (8, 8))), (int(chance.integers(1, 4)),))
        return made

    few, many = scores(40), scores(1000)
    widths = []
    for made in (few, many):
        low, high = interval_of(resampled_means([made]))
        assert low < made.miou() < high
        assert interval_of(resampled_means([made])) == (low, high), "the same on every call"
        widths.append(high - low)
    assert widths[1] < widths[0] / 3
    same = FewShotIoU(few.episodes[:1] * 50)
    assert interval_of(resampled_means([same])) == pytest.approx((same.miou(), same.miou()))


def test_the_interval_is_of_the_mean_over_seeds():
    good, bad = FewShotIoU(), FewShotIoU()
    truth = torch.tensor([[1, 1, 0, 0]])
    for _ in range(30):
        good.add(truth, truth, (1,))
        bad.add(1 - truth, truth, (2,))
    assert interval_of(resampled_means([good, bad])) == (50, 50)


def test_one_episode_by_hand():
    score = score_episode(torch.tensor([[1, 1, 0]]), torch.tensor([[1, 0, 0]]), (7, 9))
    assert score.counts == ((1, 2), (0, 0))
    assert (score.foreground, score.background) == ((1, 2), (1, 2))
    assert score.miou() == 75, "a class that is neither there nor predicted counts 100"
