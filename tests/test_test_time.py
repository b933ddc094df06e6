"""Variants at test time do what they say."""

from dataclasses import replace

import pytest
import torch

from la.episodes.batch import pack
from la.episodes.sampling import Episode, Pair
from la.evaluation.test_time import averaged_over_draws, with_flips
from la.model.label_anything import LabelAnything, preset

CHANNELS = 8


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    maps = {i: torch.randn(4, 4, CHANNELS, generator=generator) for i in range(1, 5)}
    left = torch.zeros(16, 16)
    left[:, :8] = 1
    pairs = (Pair(0, 0, (1,), (), ()), Pair(1, 1, (2,), (), ()))
    episode = Episode(0, (7, 9), 3, (1, 2), pairs)
    return pack((episode,), lambda ids: torch.stack([maps[i] for i in ids]), lambda *_: left, lambda _: (40, 40))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LabelAnything(preset("debug", channels=CHANNELS)).eval()


@torch.no_grad()
def test_flips_do_not_care_which_way_round_the_query_comes(model, batch):
    mirrored = replace(batch, query=batch.query.flip(2))
    torch.testing.assert_close(with_flips(model, mirrored), with_flips(model, batch).flip(-1))
    assert not torch.allclose(model(mirrored), model(batch).flip(-1)), "the plain model does"


@torch.no_grad()
def test_draws_of_the_token_pool_are_averaged(model, batch):
    expected = (model(batch, [0]) + model(batch, [1]) + model(batch, [2])) / 3
    torch.testing.assert_close(averaged_over_draws(model, batch, 3), expected)
