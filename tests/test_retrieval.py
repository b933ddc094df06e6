"""Support retrieval: the nearest photos, by a matrix product and by faiss alike."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from la.episodes.retrieval import SupportIndex, descriptor
from pipelines.config import EvaluateConfig
from pipelines.episodes.episode_shards import evaluation_plan


@pytest.fixture(scope="module")
def pool():
    torch.manual_seed(0)
    return [7, 3, 11, 5, 2, 13], F.normalize(torch.randn(6, 8), dim=-1)


def test_the_nearest_photos_come_first_and_only_from_those_allowed(pool):
    ids, descriptors = pool
    index = SupportIndex(ids, descriptors)
    query = descriptors[1]  # photo 3
    ranked = sorted(ids, key=lambda i: -(descriptors[ids.index(i)] @ query).item())
    assert index.nearest(query, 3) == ranked[:3]
    assert index.nearest(query, 2, among=[i for i in ids if i != 3]) == ranked[1:3]
    assert index.nearest(query, 9, among=[5]) == [5]
    assert index.nearest(query, 2, among=[]) == []
    with pytest.raises(KeyError):
        index.nearest(query, 1, among=[99])


def test_the_order_of_the_pool_changes_nothing(pool):
    ids, descriptors = pool
    twins = SupportIndex([4, *ids, 1], torch.cat((descriptors[:1], descriptors, descriptors[:1])))
    assert twins.nearest(descriptors[0], 3) == [1, 4, 7]  # equal ones by their ids
    turned = SupportIndex(ids[::-1], descriptors.flip(0))
    assert turned.nearest(descriptors[2], 6) == SupportIndex(ids, descriptors).nearest(descriptors[2], 6)


def test_faiss_finds_what_the_matrix_product_finds(pool):
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    ids, descriptors = pool
    small, large = SupportIndex(ids, descriptors), SupportIndex(ids, descriptors, large=1)
    assert large._faiss is not None
    for query in descriptors:
        assert large.nearest(query, 4) == small.nearest(query, 4)
        assert large.nearest(query, 2, among=[2, 5, 13]) == small.nearest(query, 2, among=[2, 5, 13])


def test_a_descriptor_is_a_unit_vector_whatever_the_size_of_features():
    features = torch.randn(2, 3, 3, 8)
    torch.testing.assert_close(descriptor(features * 9), descriptor(features))
    torch.testing.assert_close(descriptor(features).norm(dim=-1), torch.ones(2))


def test_episodes_of_nearest_supports_belong_to_the_features_that_chose_them():
    stores = [
        SimpleNamespace(key=key, path=Path("w/features") / key, dataset=lambda _: SimpleNamespace(digest="d"))
        for key in "ab"
    ]
    for selection, alike in (("random", True), ("nearest", False)):
        config = EvaluateConfig(workspace=Path("w"), support_selection=selection)
        one, other = (evaluation_plan(config, 0).folder(store) for store in stores)
        assert (one == other) == alike
