"""The model: its size, its invariances, and that packing is exact."""

import math

import pytest
import torch

from la.attention import Attention
from la.batch import pack
from la.episodes import Episode, Pair
from la.errors import InputError
from la.losses import focal_loss
from la.model import LabelAnything, ModelConfig, load_state, save_state
from la.schedules import warmup_cosine

GRID, CHANNELS = (6, 6), 24
CONFIG = ModelConfig(channels=CHANNELS, dim=32, heads=4)


def features(images):
    return torch.stack([torch.randn(*GRID, CHANNELS, generator=torch.Generator().manual_seed(i)) for i in images])


def mask(image, annotations):
    generator = torch.Generator().manual_seed(1000 * image + sum(annotations))
    return (torch.rand(24, 24, generator=generator) > 0.6).float()


def pack_double(*episodes):
    batch = pack(episodes, lambda ids: features(ids).double(), mask, lambda _: (100, 200))
    batch.masks, batch.points, batch.boxes = batch.masks.double(), batch.points.double(), batch.boxes.double()
    return batch


BOX, OTHER_BOX = (10.0, 20.0, 60.0, 80.0), (90.0, 5.0, 180.0, 50.0)
POINTS = ((30.5, 40.5, 1), (120.5, 70.5, 0))
MIXED = Episode(
    0,
    (7, 3),
    100,
    (1, 2, 3),
    (
        Pair(0, 0, (11,), (), ()),
        Pair(0, 1, (), POINTS, (BOX,)),
        Pair(1, 1, (12, 13), (), (BOX, OTHER_BOX)),
        Pair(2, 0, (), ((5.5, 5.5, 1),), ()),
    ),
)
PLAIN = Episode(1, (9,), 101, (4,), (Pair(0, 0, (14,), (), ()),))


@pytest.fixture(params=["complete", "bare"])
def model(request):
    torch.manual_seed(0)
    full = request.param == "complete"
    config = ModelConfig(CHANNELS, 32, 4, token_pool=full, class_example_mixer=full, spatial_convs=full)
    return LabelAnything(config).double().eval()


def test_paper_preset_has_one_point_four_million_parameters():
    total = sum(LabelAnything(ModelConfig()).parameter_table().values())
    assert abs(total - 1.4e6) < 0.05 * 1.4e6


def test_logits_are_four_times_the_grid_for_background_and_each_class(model):
    assert model(pack_double(MIXED)).shape == (1, 3, 24, 24)


def test_batch_mates_and_the_padded_class_they_bring_change_nothing(model):
    alone, together = model(pack_double(PLAIN)), model(pack_double(MIXED, PLAIN))
    torch.testing.assert_close(together[1, :2], alone[0], atol=1e-10, rtol=0)
    assert (together[1, 2] < -1e3).all()


def test_permuting_classes_permutes_logits():
    torch.manual_seed(0)
    bare = LabelAnything(ModelConfig(CHANNELS, 32, 4, token_pool=False)).double().eval()
    swapped = MIXED._replace(classes=MIXED.classes[::-1], pairs=tuple(p._replace(slot=1 - p.slot) for p in MIXED.pairs))
    torch.testing.assert_close(bare(pack_double(swapped))[:, [0, 2, 1]], bare(pack_double(MIXED)), atol=1e-10, rtol=0)


def test_order_of_boxes_and_pairs_changes_nothing(model):
    turned = MIXED._replace(pairs=tuple(p._replace(boxes=p.boxes[::-1]) for p in MIXED.pairs[::-1]))
    torch.testing.assert_close(model(pack_double(turned)), model(pack_double(MIXED)), atol=1e-10, rtol=0)


def test_padding_points_and_boxes_change_nothing(model):
    batch = pack_double(MIXED)
    padded = pack_double(MIXED)
    pairs = len(batch.points)
    padded.points = torch.cat((batch.points, torch.rand(pairs, 2, 2).double()), 1)
    padded.point_labels = torch.nn.functional.pad(batch.point_labels, (0, 2), value=-1)
    padded.boxes = torch.cat((batch.boxes, torch.rand(pairs, 1, 4).double()), 1)
    padded.box_valid = torch.nn.functional.pad(batch.box_valid, (0, 1))
    torch.testing.assert_close(model(padded), model(batch), atol=1e-10, rtol=0)


def test_evaluation_is_deterministic_and_training_draws_pool_rows():
    torch.manual_seed(0)
    model = LabelAnything(CONFIG).eval()
    batch = pack((MIXED, PLAIN), features, mask, lambda _: (100, 200))
    assert torch.equal(model(batch), model(batch))
    one, other = (model(batch, torch.Generator().manual_seed(s)) for s in (1, 2))
    assert not torch.equal(one, other)
    rows = model.prompt_encoder.pool.draw(50, 21, torch.Generator().manual_seed(0))
    assert (rows[:, 0] == 0).all()
    assert all(len(set(row.tolist())) == 21 for row in rows)


def test_packing_equals_one_episode_at_a_time_gradients_too(model):
    def run(batches):
        model.zero_grad()
        sum(model(b)[:, :2].square().sum() for b in batches).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    together = run([pack_double(MIXED, PLAIN)])
    apart = run([pack_double(MIXED), pack_double(PLAIN)])
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("moved", ["masks", "points", "boxes"])
def test_every_kind_of_prompt_moves_the_result(model, moved):
    batch = pack_double(MIXED)
    before = model(batch)
    setattr(batch, moved, 1 - getattr(batch, moved))
    assert (model(batch) - before).abs().max() > 1e-6


def test_checkpoint_round_trip_gives_the_same_model(tmp_path):
    model = LabelAnything(CONFIG).eval()
    torch.save(save_state(model), tmp_path / "m.pt")
    again = load_state(torch.load(tmp_path / "m.pt", weights_only=True)).eval()
    batch = pack((MIXED,), features, mask, lambda _: (100, 200))
    assert torch.equal(again(batch), model(batch))


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(InputError, match="multiple of 16"):
        ModelConfig(dim=100)


def test_focal_loss_by_hand():
    logits = torch.zeros(1, 2, 1, 4)
    logits[0, 1, 0, 3] = math.log(3)  # p = 1/4, 3/4 there
    truth = torch.tensor([[[0, 0, 0, 1]]])
    half, quarter = 0.25 * math.log(2), 1 / 16 * math.log(4 / 3)
    assert focal_loss(logits, truth, class_weights="none").item() == pytest.approx((3 * half + quarter) / 4)
    assert focal_loss(logits, truth, class_weights="inverse").item() == pytest.approx((half + quarter) / 2)
    by_log = (3 * half / math.log(1.85) + quarter / math.log(1.35)) / 4
    assert focal_loss(logits, truth, class_weights="log").item() == pytest.approx(by_log)
    ignored = torch.tensor([[[0, 255, 255, 1]]])
    assert focal_loss(logits, ignored, class_weights="none").item() == pytest.approx((half + quarter) / 2)
    assert focal_loss(logits, truth, gamma=0, class_weights="none").item() == pytest.approx(
        (3 * math.log(2) + math.log(4 / 3)) / 4
    )


def test_schedule_warms_up_then_falls_to_zero():
    factors = [warmup_cosine(s, 10, 110) for s in range(111)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10] == 1
    assert factors[60] == pytest.approx(0.5)
    assert factors[110] == 0


def test_attention_without_projecting_the_map_is_exact():
    torch.manual_seed(0)
    attention = Attention(32, 16, heads=4).double()
    tokens, image = torch.randn(3, 5, 32).double(), torch.randn(3, 40, 32).double()
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 1, 1, 0, 0]]).bool()
    torch.testing.assert_close(attention.gather(tokens, image), attention(tokens, image, image))
    torch.testing.assert_close(attention.spread(image, tokens, valid), attention(image, tokens, tokens, valid))
