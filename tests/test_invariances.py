"""What must not change the result, on episodes drawn by hypothesis, for every preset; and packing is exact."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from la.episodes.batch import dense_grid, pack
from la.episodes.sampling import Episode, Pair
from la.model.label_anything import LabelAnything, build, preset
from tests.plain_model import plain_logits

GRID, CHANNELS, SIZE = (5, 5), 12, (100, 200)
SMALL = {"channels": CHANNELS, "dim": 32}
MODELS = {
    "paper": preset("paper", **SMALL),
    "bare": preset("paper", token_pool=False, class_example_mixer=False, spatial_convs=False, **SMALL),
    "official": preset("official", two_way_ffn=48, block_ffn=40, mask_px=None, **SMALL),
}
TOLERANCE = {"atol": 1e-10, "rtol": 0}
BOXES = ((10.0, 20.0, 60.0, 80.0), (90.0, 5.0, 180.0, 50.0), (0.0, 0.0, 200.0, 100.0))
POINTS = ((30.5, 40.5, 1), (120.5, 70.5, 0), (199.5, 0.5, 1))
examples = settings(max_examples=15, deadline=None, derandomize=True)


def features(images):
    drawn = [torch.randn(*GRID, CHANNELS, generator=torch.Generator().manual_seed(i)) for i in images]
    return torch.stack(drawn).double()


def mask(image, annotations):
    generator = torch.Generator().manual_seed(1000 * image + sum(annotations))
    return (torch.rand(20, 20, generator=generator) > 0.6).double()


def packed(*episodes, supports=None):
    batch = pack(episodes, features, mask, lambda _: SIZE, supports)
    return replace(batch, masks=batch.masks.double(), points=batch.points.double(), boxes=batch.boxes.double())


@st.composite
def episodes(draw):
    """1 to 3 classes on 1 to 4 supports, any classes on each, each with any prompts; shots differ by class."""
    classes, supports = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    prompts = st.tuples(
        st.lists(st.sampled_from((11, 12, 13)), max_size=2, unique=True),
        st.lists(st.sampled_from(POINTS), max_size=3, unique=True),
        st.lists(st.sampled_from(BOXES), max_size=2, unique=True),
    ).filter(any)
    pairs = [
        Pair(support, slot, *map(tuple, draw(prompts)))
        for support in range(supports)
        for slot in range(classes)
        if draw(st.booleans())
    ]
    first = draw(st.integers(0, 50))
    return Episode(0, tuple(range(classes)), 900 + first, tuple(range(first, first + supports)), tuple(pairs))


def untrained(config):
    torch.manual_seed(0)
    model = build(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases and norms are trivial at first
    return model


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return untrained(MODELS[request.param])


@pytest.fixture(scope="module", params=[*MODELS, "hybrid"])
def either(request):
    """LA or the hybrid, whose matching is fitted to objects of three classes."""
    if request.param in MODELS:
        return untrained(MODELS[request.param])
    hybrid = untrained(preset("hybrid", channels=CHANNELS))
    objects = F.normalize(features(range(9)).flatten(1, 2).mean(1), dim=-1)
    hybrid.matching.metric.fit(objects, torch.arange(9) % 3)
    hybrid.matching.completion.point.fill_(0.3)  # of random features none are near 1
    return hybrid


@examples
@given(episodes(), st.data())
def test_permuting_classes_permutes_logits(either, episode, data):
    order = data.draw(st.permutations(range(len(episode.classes))))
    pairs = tuple(p._replace(slot=order.index(p.slot)) for p in episode.pairs)
    permuted = episode._replace(classes=tuple(episode.classes[i] for i in order), pairs=pairs)
    slots = [0, *(1 + i for i in order)]
    expected = either(packed(episode))[:, slots]
    pool = either.prompt_encoder.pool if isinstance(either, LabelAnything) else None
    kept = None if pool is None else pool.rows.data.clone()
    if pool is not None:
        pool.rows.data[: len(slots)] = kept[slots]
    try:
        torch.testing.assert_close(either(packed(permuted)), expected, **TOLERANCE)
    finally:
        if pool is not None:
            pool.rows.data.copy_(kept)


@examples
@given(episodes(), episodes())
def test_batch_mates_and_the_padding_they_bring_change_nothing(either, episode, mate):
    alone, together = either(packed(episode)), either(packed(episode, mate))
    slots = len(episode.classes) + 1
    torch.testing.assert_close(together[:1, :slots], alone, **TOLERANCE)
    assert (together[0, slots:] < -1e3).all()


@examples
@given(episodes())
def test_padded_points_and_boxes_change_nothing(either, episode):
    batch = packed(episode)
    pairs = len(batch.points)
    padded = replace(
        batch,
        points=torch.cat((batch.points, torch.rand(pairs, 2, 2).double()), 1),
        point_labels=F.pad(batch.point_labels, (0, 2), value=-1),
        boxes=torch.cat((batch.boxes, torch.rand(pairs, 1, 4).double()), 1),
        box_valid=F.pad(batch.box_valid, (0, 1)),
    )
    torch.testing.assert_close(either(padded), either(batch), **TOLERANCE)


@examples
@given(episodes(), st.randoms(use_true_random=False))
def test_the_order_of_supports_pairs_points_and_boxes_changes_nothing(either, episode, chance):
    order = list(range(len(episode.supports)))
    chance.shuffle(order)
    pairs = [
        p._replace(support=order.index(p.support), points=p.points[::-1], boxes=p.boxes[::-1]) for p in episode.pairs
    ]
    chance.shuffle(pairs)
    turned = episode._replace(supports=tuple(episode.supports[i] for i in order), pairs=tuple(pairs))
    torch.testing.assert_close(either(packed(turned)), either(packed(episode)), **TOLERANCE)


@examples
@given(episodes(), st.integers(1, 4))
def test_supports_in_chunks_give_the_same_prototypes(model, episode, size):
    chunks = (packed(episode, supports=range(i, i + size)) for i in range(0, len(episode.supports), size))
    torch.testing.assert_close(model.prototypes(chunks), model.prototypes(packed(episode)), **TOLERANCE)


@examples
@given(episodes())
def test_evaluation_is_deterministic(either, episode):
    assert torch.equal(either(packed(episode)), either(packed(episode)))


@examples
@given(episodes(), episodes())
def test_packing_equals_a_plain_loop_over_pairs_gradients_too(model, one, other):
    def gradients(logits):
        model.zero_grad()
        sum(each.square().sum() for each in logits).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = [plain_logits(model, e, features, mask, lambda _: SIZE) for e in (one, other)]
    together = model(packed(one, other))
    together = [logits[: len(expected)] for logits, expected in zip(together, plain, strict=True)]
    for logits, expected in zip(together, plain, strict=True):
        torch.testing.assert_close(logits, expected, **TOLERANCE)
    ours, theirs = gradients(together), gradients(plain)
    # not every parameter is used by every episode: the loop leaves those out, the packed model may give zeros
    for name in ours.keys() | theirs.keys():
        zero = torch.zeros_like(model.get_parameter(name))
        torch.testing.assert_close(ours.get(name, zero), theirs.get(name, zero), atol=1e-10, rtol=1e-10)


def test_absent_pairs_matter_only_where_they_are_let_in():
    episode = Episode(0, (0, 1), 9, (1, 2), (Pair(0, 0, (11,), (), ()), Pair(1, 1, (), POINTS, BOXES)))
    torch.manual_seed(0)
    config = MODELS["official"]
    clean = LabelAnything(config).double().eval()
    leaky = LabelAnything(replace(config, absent_pairs=True)).double().eval()
    leaky.load_state_dict(clean.state_dict())
    grid = dense_grid(packed(episode))
    assert len(grid.pair_support) == 6
    assert grid.pairs.counted.sum() == 4
    assert (leaky(packed(episode)) - clean(packed(episode))).abs().max() > 1e-6
