"""Episodes: what they promise, and that nothing but their arguments decides them."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from la.data.coco import Annotation, Dataset, Image, decode
from la.data.folds import fold_classes
from la.episodes.pool import MAX_POINTS, Pool
from la.episodes.sampling import evaluation_episode, training_episode
from la.errors import InputError

SIZE = 64


def rle(mask):
    from pycocotools import mask as tools

    return bytes(tools.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"])


def make_dataset(images=60, classes=16, per_image=3, seed=0):
    """Random rectangles of random classes, one crowd in ten."""
    chance = np.random.default_rng(seed)
    records, annotations, number = {}, {}, 0
    for image in range(1, images + 1):
        records[image] = Image(image, f"{image}.jpg", SIZE, SIZE)
        found = []
        for _ in range(per_image):
            number += 1
            x, y = map(int, chance.integers(0, 20, 2))
            w, h = map(int, chance.integers(10, 44, 2))
            mask = np.zeros((SIZE, SIZE), np.uint8)
            mask[y : y + h, x : x + w] = 1
            crowd = bool(chance.random() < 0.1)
            category = int(chance.integers(1, classes + 1))
            found.append(Annotation(number, image, category, crowd, int(mask.sum()), (x, y, x + w, y + h), rle(mask)))
        annotations[image] = tuple(found)
    return Dataset("train", records, {c: f"class {c}" for c in range(1, classes + 1)}, annotations)


DATASET = make_dataset()
POOL = Pool(DATASET, fold_classes(DATASET.categories, 0)[0], min_area=200)


def check(episode, shots):
    assert episode.query not in episode.supports
    assert len(set(episode.classes)) == len(episode.classes)
    assert len(set(episode.supports)) == len(episode.supports)
    shown = {pair.slot for pair in episode.pairs}
    assert shown == set(range(len(episode.classes))), "every class is shown on a support"
    for pair in episode.pairs:
        image, category = episode.supports[pair.support], episode.classes[pair.slot]
        found = {a.id: a for a in DATASET.annotations[image] if a.category_id == category}
        assert set(pair.masks) <= found.keys()
        assert not any(found[i].is_crowd for i in pair.masks)
        assert pair.masks or pair.points or pair.boxes
        inside = decode([a for a in found.values() if not a.is_crowd], SIZE, SIZE)
        for x, y, label in pair.points:
            assert label == 1
            assert inside[int(y), int(x)], "a point lies in an instance of its class"
        for x0, y0, x1, y1 in pair.boxes:
            assert 0 <= x0 <= x1 <= SIZE
            assert 0 <= y0 <= y1 <= SIZE


@settings(max_examples=60, deadline=None)
@given(index=st.integers(0, 10**6), ways=st.integers(1, 4), shots=st.integers(1, 4))
def test_training_episodes_keep_their_promises(index, ways, shots):
    episode = training_episode(POOL, "t", index, ways, shots)
    check(episode, shots)
    assert len(episode.classes) == ways
    assert set(episode.classes) <= set(POOL.classes)
    assert set(POOL.classes_in[episode.query]) & set(episode.classes)


@settings(max_examples=60, deadline=None)
@given(
    index=st.integers(0, 10**6),
    ways=st.integers(1, 3),
    shots=st.integers(1, 3),
    prompt=st.sampled_from(["mask", "point", "box", "point_box"]),
)
def test_test_episodes_keep_their_promises(index, ways, shots, prompt):
    episode = evaluation_episode(POOL, "t", index, ways, shots, prompt)
    check(episode, shots)
    assert len(episode.supports) == ways * shots
    assert set(POOL.classes_in[episode.query]) & set(episode.classes)
    for pair in episode.pairs:
        assert bool(pair.masks) == (prompt == "mask")
        assert bool(pair.points) == ("point" in prompt)
        assert bool(pair.boxes) == ("box" in prompt)


def test_varied_supports_serve_several_classes_with_several_kinds_of_prompt():
    drawn = [evaluation_episode(POOL, "t", i, 3, 3, "mixed", varied=True) for i in range(100)]
    for episode in drawn:
        check(episode, 3)
        assert {pair.slot for pair in episode.pairs} == {0, 1, 2}, "every class has a shot"
    assert len({len(episode.supports) for episode in drawn}) > 3, "L is not N*K"
    assert any(len({p.slot for p in e.pairs if p.support == 0}) > 1 for e in drawn), "one photo, several classes"
    pairs = [pair for episode in drawn for pair in episode.pairs]
    assert any(bool(p.masks) + bool(p.points) + bool(p.boxes) > 1 for p in pairs), "one class, several kinds"
    assert all(any(bool(getattr(p, kind)) for p in pairs) for kind in ("masks", "points", "boxes"))


def test_the_query_shows_one_some_or_all_classes_about_equally_often():
    counts = [0, 0, 0]
    for index in range(600):
        episode = training_episode(POOL, "t", index, 2, 1)
        counts[len(set(POOL.classes_in[episode.query]) & set(episode.classes))] += 1
    assert counts[0] == 0
    assert min(counts[1:]) > 200


def test_a_query_may_be_drawn_image_first_or_of_classes_that_a_run_shares():
    by_image = [evaluation_episode(POOL, "t", i, 1, 1, "mask", query_draw="image") for i in range(2000)]
    counts = np.bincount([e.query for e in by_image])[1:]
    shown = POOL.images_showing(1)
    assert {e.query for e in by_image} == set(shown)
    assert counts.max() < 3 * len(by_image) / len(shown), "images are equally likely, whatever they show"
    for run in ("seed0", "seed1"):
        fixed = [evaluation_episode(POOL, run, i, 2, 1, "mask", query_draw="run") for i in range(50)]
        assert len({frozenset(e.classes) for e in fixed}) == 1
        assert len({e.query for e in fixed}) > 5


def test_prompt_kinds_are_compared_on_the_same_images():
    kinds = [evaluation_episode(POOL, "t", 5, 2, 1, prompt)[1:4] for prompt in ("mask", "point", "box", "point_box")]
    assert all(kind == kinds[0] for kind in kinds)


def test_an_episode_is_the_same_on_every_machine():
    drawn = [training_episode(POOL, "t", i, 2, 2) for i in range(20)]
    drawn += [evaluation_episode(POOL, "t", i, 2, 2, "point") for i in range(20)]
    assert hashlib.sha256(repr(drawn).encode()).hexdigest()[:16] == GOLDEN


def test_another_seed_or_index_is_another_episode():
    first = evaluation_episode(POOL, "seed0", 0, 1, 1, "mask")
    assert first == evaluation_episode(POOL, "seed0", 0, 1, 1, "mask")
    others = {evaluation_episode(POOL, "seed0", i, 1, 1, "mask")[1:] for i in range(30)}
    assert len(others) > 20
    assert [evaluation_episode(POOL, "seed1", i, 1, 1, "mask") for i in range(5)] != [
        evaluation_episode(POOL, "seed0", i, 1, 1, "mask") for i in range(5)
    ]


def test_points_grow_with_the_share_of_the_photo():
    small = np.zeros((SIZE, SIZE))
    small[:3, :3] = 1
    large = np.ones((SIZE, SIZE))
    counts = []
    for mask in (small, large):
        one = Annotation(10**6 + int(mask.sum()), 1, 1, False, int(mask.sum()), (0, 0, 1, 1), rle(mask))
        interior = POOL.interior(one)
        import random

        uniform = random.Random("x").random
        counts.append([len(interior.points(uniform)) for _ in range(300)])
    assert max(counts[1]) == MAX_POINTS
    assert np.mean(counts[0]) < 2.2
    assert np.mean(counts[1]) > 8


def test_too_few_images_name_what_is_missing():
    with pytest.raises(InputError, match="50-shot episodes need 1 classes with 51 images"):
        evaluation_episode(POOL, "fold0", 0, 1, 50, "mask")
    assert POOL.skipped(50)[POOL.classes[0]].endswith("51 needed")


def test_classes_with_few_images_give_fewer_shots_in_training():
    few = make_dataset(images=30, classes=8)
    pool = Pool(few, range(1, 9), min_area=200)
    assert len(training_episode(pool, "t", 0, 1, 25).supports) < 25


GOLDEN = "b7699c837a1e0d8b"
