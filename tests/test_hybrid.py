"""The hybrid: what matching knows, worked by hand; and what its decoder is taught."""

import pytest
import torch
from torch.nn import functional as F

from la.data.coco import IGNORED
from la.episodes.batch import pack
from la.episodes.sampling import Episode, Pair
from la.errors import InputError
from la.evaluation.losses import iou_loss
from la.model.label_anything import build, load_state, preset, save_state
from la.model.matching import Matching, smoothed
from la.model.object_metric import ObjectMetric
from la.model.prompt_completion import PromptCompletion
from pipelines.config import TrainConfig
from pipelines.training.prepare import model_config

SIZE = (40, 40)  # pixels of every photo: ten to a token
LEFT, RIGHT = torch.tensor([1.0, 0.0, 0.2]), torch.tensor([0.0, 1.0, 0.2])


def halves(images):
    """(n, 4, 4, 3): the left half of every photo has one feature, the right half another."""
    photo = torch.stack((LEFT, LEFT, RIGHT, RIGHT)).expand(4, 4, 3)
    return torch.stack([photo if image < 100 else photo.flip(1) for image in images])


def left_mask(image, annotations):
    mask = torch.zeros(16, 16)
    mask[:, :8] = 1
    return mask


def batch_of(*pairs, query=100, supports=(1,), classes=(7,)):
    return pack([Episode(0, classes, query, supports, pairs)], halves, left_mask, lambda _: SIZE)


def test_matching_finds_the_half_that_the_mask_shows():
    maps = Matching(3)(batch_of(Pair(0, 0, (1,), (), ())))
    assert maps.shape == (1, 2, 9, 4, 4)
    assert (maps[:, 0] == 0).all()
    likeness = LEFT @ RIGHT / LEFT.square().sum()
    cosine = maps[0, 1, 0]  # the query is mirrored: its right half is what the support shows on the left
    torch.testing.assert_close(cosine[:, 2:], torch.ones(4, 2))
    torch.testing.assert_close(cosine[:, :2], likeness.expand(4, 2))
    difference = maps[0, 1, 0:4:2] - maps[0, 1, 1:4:2]  # of class and rest, in the features and in the metric
    for seen in (*difference, *maps[0, 1, 4:6]):  # and affinity at two temperatures
        assert (seen[:, 2:] > 0).all()
        assert (seen[:, :2] < 0).all()
    torch.testing.assert_close(maps[0, 1, 6], torch.full((4, 4), 0.5).log() / 4)
    torch.testing.assert_close(maps[0, 1, 7:], torch.zeros(2, 4, 4))  # one way, one shot


def test_an_affinity_over_two_shots_is_the_softmax_over_the_tokens_of_both():
    pairs = (Pair(0, 0, (1,), (), ()), Pair(1, 0, (1,), (), ()))
    batch = batch_of(*pairs, supports=(1, 101))
    unit_query, unit_support = (F.normalize(x, dim=-1) for x in (batch.query.flatten(1, 2), batch.support))
    for number, temperature in ((4, 0.1), (5, 0.05)):
        scores = (smoothed(unit_query)[0] @ unit_support.flatten(0, 2).T / temperature).softmax(-1)
        read = scores @ left_mask(0, ())[::4, ::4].flatten().repeat(2)
        odds = (read.clamp(1e-4, 1 - 1e-4).logit() - torch.tensor(0.5).logit()) / 4
        torch.testing.assert_close(Matching(3)(batch)[0, 1, number].flatten(), odds, atol=1e-5, rtol=1e-4)


def plain_maps(matching, batch):
    """The equations of docs/hybrid.md, one pair and one temperature after the other -> (B, C, 6, n)."""
    query, support = (F.normalize(x, dim=-1).flatten(1, 2) for x in (batch.query, batch.support))
    weights, (_, slots) = matching.completion(batch, support), batch.slots.shape
    maps = torch.zeros(*batch.slots.shape, 6, query.shape[1])
    for episode, c in (batch.slots.nonzero()).tolist():
        if c == 0:
            continue
        smooth = matching.metric(smoothed(query[episode][None])[0])
        pairs = [
            (int(slot) % slots, support[photo], weight)
            for slot, photo, weight in zip(batch.pairs.slot, batch.pair_support, weights, strict=True)
            if slot // slots == episode and slot % slots > 0
        ]
        shown = [(tokens, weight) for of, tokens, weight in pairs if of == c]
        belonging = (
            sum(weight @ tokens for tokens, weight in shown),
            sum((1 - weight) @ tokens for tokens, weight in shown),
        )
        for side, prototype in enumerate(F.normalize(total, dim=-1) for total in belonging):
            maps[episode, c, side] = query[episode] @ prototype
            maps[episode, c, 2 + side] = smooth @ matching.metric(prototype)
        mean = sum(weight.mean() for _, weight in shown) / len(pairs)
        for number, temperature in enumerate((0.1, 0.05)):
            heeded = [(of, (smooth @ matching.metric(t).T / temperature).exp(), weight) for of, t, weight in pairs]
            read = sum(much @ weight for of, much, weight in heeded if of == c) / sum(
                much.sum(1) for _, much, _ in heeded
            )
            maps[episode, c, 4 + number] = (read.clamp(1e-4, 1 - 1e-4).logit() - mean.logit()) / 4
    return maps


@pytest.mark.parametrize("at_once", [1, 40, 2**21])  # one support, two, all
def test_maps_are_those_of_the_equations_however_supports_share_the_work(monkeypatch, at_once):
    """Of two episodes that differ in classes and shots; supports show one class or both, and one shows none."""

    def noise(*key):
        return torch.Generator().manual_seed(sum(key))

    def features(images):
        return torch.stack([torch.randn(2, 2, 6, generator=noise(image)) for image in images])

    def mask(_, annotations):
        return torch.rand(16, 16, generator=noise(*annotations))

    monkeypatch.setattr("la.model.matching.AFFINITIES_AT_ONCE", at_once)
    masks = [Pair(support, slot, (support + 10 * slot,), (), ()) for support, slot in ((0, 0), (0, 1), (2, 1))]
    prompts = [Pair(3, 0, (4,), ((5.0, 5.0, 1),), ()), Pair(3, 1, (), (), ((0.0, 0.0, 20.0, 30.0),))]
    first = Episode(0, (7, 8), 100, (1, 2, 3, 4), (*masks, *prompts))
    second = Episode(1, (9,), 101, (1,), (Pair(0, 0, (5,), (), ()),))
    batch, matching = pack([first, second], features, mask, lambda _: SIZE), Matching(6)
    matching.metric.fit(F.normalize(features(range(20)).flatten(1, 2)[:, 0], dim=-1), torch.arange(20) % 4)
    torch.testing.assert_close(matching(batch)[:, :, :6].flatten(3), plain_maps(matching, batch), atol=1e-5, rtol=1e-4)


def test_affinities_of_classes_compete_for_the_same_attention():
    right = Pair(1, 1, (1,), (), ())  # the second class is what its support shows on the left, the first one's right
    batch = batch_of(Pair(0, 0, (1,), (), ()), right, supports=(1, 101), classes=(7, 8))
    alone = Matching(3)(batch_of(Pair(0, 0, (1,), (), ())))[0, 1, 5]
    first, second = Matching(3)(batch)[0, 1:, 5]
    assert (first[:, 2:] < alone[:, 2:] - 0.5).all()  # where the second class's support shows the like as background
    read = torch.stack((first, second)) * 4 + torch.tensor(0.25).logit()
    torch.testing.assert_close(read.sigmoid().sum(0), torch.full((4, 4), 0.5), atol=1e-3, rtol=0)


def test_more_shots_than_fit_in_memory_at_once_give_the_same_maps(monkeypatch):
    pairs = tuple(Pair(n, n % 2, (1,), (), ()) for n in range(5))
    batch = batch_of(*pairs, supports=(1, 2, 101, 3, 102), classes=(7, 8))
    together = Matching(3)(batch)
    monkeypatch.setattr("la.model.matching.PAIRS_AT_ONCE", 1)
    monkeypatch.setattr("la.model.matching.AFFINITIES_AT_ONCE", 1)
    torch.testing.assert_close(Matching(3)(batch), together)


def test_supports_in_chunks_give_the_same_maps():
    pairs = tuple(Pair(n, n % 2, (1,), (), ()) for n in range(5))
    episode = Episode(0, (7, 8), 100, (1, 2, 101, 3, 102), pairs)
    chunks = (pack([episode], halves, left_mask, lambda _: SIZE, range(n, n + 2)) for n in (0, 2, 4))
    together = pack([episode], halves, left_mask, lambda _: SIZE)
    torch.testing.assert_close(Matching(3)(chunks), Matching(3)(together))


@pytest.mark.parametrize("side", [2, 3])
def test_neighbours_of_one_feature_are_compared_as_one_and_give_the_same_maps(monkeypatch, side):
    """Grids of 4 x 6 in squares of one feature and one coverage; 3 does not divide the 4 rows."""

    def blocks(image, channels):
        generator = torch.Generator().manual_seed(image)
        small = torch.rand(-(-4 // side), 6 // side, channels, generator=generator)
        return small.repeat_interleave(side, 0)[:4].repeat_interleave(side, 1)

    def features(images):
        return torch.stack([blocks(image, 5) - 0.5 for image in images])

    def mask(image, annotations):  # at four cells to a feature cell
        return blocks(sum(annotations), 1)[..., 0].repeat_interleave(4, 0).repeat_interleave(4, 1)

    pairs = tuple(Pair(n, n % 2, (n + 1,), (), ()) for n in range(5))
    batch = pack([Episode(0, (7, 8), 100, (1, 2, 3, 4, 5), pairs)], features, mask, lambda _: (40, 60))
    matching = Matching(5)
    wanted = matching(batch)
    monkeypatch.setattr("la.model.matching.MOST_TOKENS", 5 * 24 / side**2)
    (annotated,) = matching.annotated(batch)
    assert annotated.keys.shape == (5, -(-4 // side) * (6 // side), 5)
    torch.testing.assert_close(matching(batch), wanted, atol=1e-5, rtol=1e-4)


def test_tokens_are_compared_as_one_by_what_their_own_episode_has(monkeypatch):
    """Neither mates in a batch nor chunks of supports change that."""

    def features(images):
        return torch.stack([torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(i)) for i in images])

    monkeypatch.setattr("la.model.matching.MOST_TOKENS", 48)
    many = Episode(0, (7, 8), 100, (1, 2, 3, 4, 5), tuple(Pair(n, n % 2, (n,), (), ()) for n in range(5)))
    few = Episode(1, (7, 8), 101, (6, 7, 8), tuple(Pair(n, n % 2, (n,), (), ()) for n in range(3)))
    matching = Matching(6)

    def packed(*episodes, supports=None):
        return pack(episodes, features, left_mask, lambda _: SIZE, supports)

    assert [part.keys.shape[:2] for part in matching.annotated(packed(many, few))] == [(3, 16), (5, 4)]
    alone = torch.cat([matching(packed(many)), matching(packed(few))])
    assert torch.equal(matching(packed(many, few)), alone)
    chunks = (packed(many, few, supports=range(n, n + 2)) for n in (0, 2, 4))
    torch.testing.assert_close(matching(chunks), alone)


def test_points_and_boxes_grow_to_what_resembles_them():
    completion = PromptCompletion()
    completion.box.fill_(0.0)
    one_point = batch_of(Pair(0, 0, (), ((5.0, 5.0, 1),), ()))
    one_box = batch_of(Pair(0, 0, (), (), ((0.0, 0.0, 30.0, 20.0),)))  # reaches into the other half
    left = left_mask(0, ())[::4, ::4]
    units = F.normalize(one_point.support, dim=-1).flatten(1, 2)
    torch.testing.assert_close(completion(one_point, units)[1].view(4, 4), left, atol=0.05, rtol=0)
    inside = torch.zeros(4, 4)
    inside[:2, :2] = 1
    torch.testing.assert_close(completion(one_box, units)[1].view(4, 4), inside, atol=0.05, rtol=0)


def test_a_point_outside_the_object_keeps_its_like_out():
    batch = batch_of(Pair(0, 0, (), ((5.0, 5.0, 1), (15.0, 35.0, 0)), ()))
    units = F.normalize(batch.support, dim=-1).flatten(1, 2)
    weight = PromptCompletion()(batch, units)[1].view(4, 4)
    assert weight[0, 0] == 1
    assert weight[3, 0] <= 0.5  # as much like the one as like the other
    assert (weight[:, 2:] < 0.05).all()


def test_thresholds_are_fitted_to_objects_whose_masks_are_known():
    completion = PromptCompletion()
    completion.point.fill_(-0.3)  # everything belongs
    prompted, masked = batch_of(Pair(0, 0, (), ((5.0, 5.0, 1),), ())), batch_of(Pair(0, 0, (1,), (), ()))
    completion.fit(prompted, masked)
    assert LEFT @ RIGHT / LEFT.square().sum() < completion.point < 1


def test_the_object_metric_forgets_what_varies_within_a_class():
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(40) % 4
    centres = F.pad(torch.eye(4), (0, 2))
    noise = torch.randn(40, 6, generator=generator) * torch.tensor([0.05] * 4 + [1.0, 1.0])
    objects = F.normalize(centres[classes] + noise, dim=-1)

    def told_apart(units):
        same = classes[:, None] == classes
        cosines = units @ units.T
        return cosines[same].mean() - cosines[~same].mean()

    metric = ObjectMetric(6)
    torch.testing.assert_close(metric(objects), objects)  # the identity before it is fitted
    metric.fit(objects, classes)
    assert told_apart(metric(objects)) > told_apart(objects) + 0.1


def test_smoothed_tokens_take_after_their_like():
    units = F.normalize(torch.tensor([[[1.0, 0.0, 0.1], [1.0, 0.1, 0.0], [0.0, 1.0, 0.0]]]), dim=-1)
    first, second, other = smoothed(units)[0]
    assert first @ second > units[0, 0] @ units[0, 1]
    assert other @ units[0, 2] > 0.999


def test_before_training_a_hybrid_votes_as_its_maps_do():
    model, batch = build(preset("hybrid", channels=3, objectness=0)), batch_of(Pair(0, 0, (1,), (), ()))
    maps = Matching(3)(batch)[:, 1]
    votes = maps[:, 0] - maps[:, 1] + maps[:, 2] - maps[:, 3] + 2 * maps[:, 4] + 2 * maps[:, 5]
    torch.testing.assert_close(model.decoder(maps, maps), votes)


def test_the_iou_loss_is_0_for_certain_truth_and_weighs_classes_by_the_root_of_their_size():
    truth = torch.zeros(1, 12, 12, dtype=torch.long)
    truth[0, :, :6], truth[0, :2, 10:], truth[0, 5, 5] = 1, 2, IGNORED
    slots = torch.ones(1, 3, dtype=torch.bool)
    sure = F.one_hot(truth.clamp(max=2), 3).movedim(-1, 1) * 40.0
    assert iou_loss(sure, truth, slots) < 1e-6
    lost = []
    for missed in (1, 2):
        logits = sure.clone()
        logits[:, 0] += 80.0 * (truth == missed)
        lost.append(iou_loss(logits, truth, slots, likelihood=0))
    torch.testing.assert_close(lost[0] / lost[1], torch.tensor((71 / 4) ** 0.5), atol=0, rtol=0.06)


def test_the_iou_loss_leaves_out_ignored_pixels_and_slots_that_an_episode_has_not():
    torch.manual_seed(0)
    truth = torch.randint(0, 2, (1, 8, 8))
    logits = torch.randn(1, 2, 8, 8)
    slots = torch.ones(1, 2, dtype=torch.bool)
    wide = F.pad(logits, (0, 0, 0, 0, 0, 1), value=-1e4)
    torch.testing.assert_close(
        iou_loss(wide, truth, torch.tensor([[True, True, False]])), iou_loss(logits, truth, slots)
    )
    truth[0, :2] = IGNORED
    changed = logits.clone()
    changed[:, :, :2] += 5 * torch.randn(1, 2, 2, 8)
    torch.testing.assert_close(iou_loss(changed, truth, slots), iou_loss(logits, truth, slots))


def test_maps_are_left_out_by_an_episodes_own_seed_and_only_in_training():
    torch.manual_seed(0)
    model, batch = build(preset("hybrid", channels=3)), batch_of(Pair(0, 0, (1,), (), ()))
    torch.nn.init.ones_(model.decoder.out.weight)  # the layers start at nothing
    model.train()
    assert torch.equal(model(batch, [5]), model(batch, [5]))
    assert not torch.equal(model(batch, [5]), model(batch, [6]))
    model.eval()
    assert torch.equal(model(batch, [5]), model(batch, [6]))


@pytest.mark.parametrize("part", ["match_prototypes", "match_affinity", "object_metric", "spatial_convs", "objectness"])
def test_every_ingredient_can_be_left_out(part):
    model = build(preset("hybrid", channels=3, **{part: 0 if part == "objectness" else False})).eval()
    assert model(batch_of(Pair(0, 0, (1,), (), ()))).shape == (1, 2, 16, 16)


def test_a_saved_hybrid_comes_back_with_what_it_was_fitted_to():
    torch.manual_seed(0)
    model = build(preset("hybrid", channels=3)).eval()
    model.matching.metric.fit(F.normalize(torch.randn(8, 3), dim=-1), torch.arange(8) % 2)
    batch = batch_of(Pair(0, 0, (1,), (), ()))
    assert torch.equal(load_state(save_state(model)).eval()(batch), model(batch))


def test_a_part_that_a_preset_has_not_is_refused_and_recipes_follow_the_preset():
    settings = TrainConfig(workspace="w", preset="hybrid")
    assert (settings.recipe, settings.loss, settings.flips) == ("hybrid", "iou", True)
    assert TrainConfig(workspace="w").recipe == "small"
    assert model_config(settings, 12).channels == 12
    with pytest.raises(InputError, match="hybrid has no setting token_pool"):
        model_config(TrainConfig(workspace="w", preset="hybrid", token_pool=False), 12)
    with pytest.raises(InputError, match="paper has no setting objectness"):
        model_config(TrainConfig(workspace="w", objectness=4), 12)
