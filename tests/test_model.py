"""The model's parts, its size and its checkpoints, losses and schedules. For its invariances see test_invariances."""

import math
import re
from dataclasses import replace

import pytest
import torch

from la.episodes.batch import pack
from la.episodes.sampling import Episode, Pair
from la.errors import InputError
from la.evaluation.losses import focal_loss
from la.model.attention import Attention
from la.model.label_anything import LabelAnything, ModelConfig, build, load_state, preset, save_state, today_names
from la.schedules import warmup_cosine

GRID, CHANNELS = (6, 6), 24
CONFIG = ModelConfig(channels=CHANNELS, dim=32, heads=4)


@pytest.mark.parametrize("name", ["paper", "official", "hybrid"])
def test_depth_adds_parameters_and_changes_nothing_else(name):
    small = {"dim": 16} if name == "hybrid" else {"dim": 32}
    plain = build(preset(name, channels=CHANNELS, **small))
    own = plain.config.depth
    for depth in (own, own + 1):
        model = build(preset(name, channels=CHANNELS, **small, depth=depth))
        assert (sum(p.numel() for p in model.parameters()) > sum(p.numel() for p in plain.parameters())) == (
            depth > own
        )
        again = load_state(save_state(model))
        assert again.config.depth == depth
        assert not plain.state_dict().keys() - again.state_dict().keys()  # a deeper model has all the plain one's parts
        batch = pack((MIXED,), features, mask, lambda _: (100, 200))
        logits = model.eval()(batch)
        assert torch.equal(logits, again.eval()(batch))
        for part in [part for name, part in model.named_modules() if name.endswith("out")]:  # starts at nothing
            torch.nn.init.normal_(part.weight) if part.weight.abs().sum() == 0 else None
        model(batch)[:, :, ::3].square().sum().backward()
        # each layer is used, in the fusion and in the decoder
        names = [re.match(r".*\.more\.|.*\.layers\.\d+\.", name) for name, _ in model.named_parameters()]
        for part in {name[0] for name in names if name}:
            grads = [p.grad for name, p in model.named_parameters() if name.startswith(part)]
            assert any(grad is not None and grad.abs().sum() > 0 for grad in grads), part


def features(images):
    return torch.stack([torch.randn(*GRID, CHANNELS, generator=torch.Generator().manual_seed(i)) for i in images])


def mask(image, annotations):
    generator = torch.Generator().manual_seed(1000 * image + sum(annotations))
    return (torch.rand(24, 24, generator=generator) > 0.6).float()


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


def test_presets_are_of_the_published_sizes():
    sizes = {name: sum(LabelAnything(preset(name)).parameter_table().values()) for name in ("paper", "official")}
    assert abs(sizes["paper"] - 1.4e6) < 0.05 * 1.4e6
    assert sizes["official"] == 10_141_612


@pytest.mark.parametrize("name", ["paper", "official"])
def test_logits_are_four_times_the_grid_for_background_and_each_class(name):
    config = preset(name, channels=CHANNELS, dim=32)
    assert LabelAnything(config)(pack((MIXED,), features, mask, lambda _: (100, 200))).shape == (1, 3, 24, 24)


def test_evaluation_is_deterministic_and_training_draws_pool_rows():
    torch.manual_seed(0)
    model = LabelAnything(CONFIG).eval()
    batch = pack((MIXED, PLAIN), features, mask, lambda _: (100, 200))
    assert torch.equal(model(batch), model(batch))
    one, other = (model(batch, seeds) for seeds in ((1, 2), (3, 4)))
    assert not torch.equal(one, other)
    rows = model.prompt_encoder.pool.draw(range(50), 21)
    assert (rows[:, 0] == 0).all()
    assert all(len(set(row.tolist())) == 21 for row in rows)


@pytest.mark.parametrize("moved", ["masks", "points", "boxes"])
def test_every_kind_of_prompt_moves_the_result(moved):
    torch.manual_seed(0)
    model = LabelAnything(CONFIG).eval()
    batch = pack((MIXED,), features, mask, lambda _: (100, 200))
    before = model(batch)
    setattr(batch, moved, 1 - getattr(batch, moved))
    assert (model(batch) - before).abs().max() > 1e-6


@pytest.mark.parametrize("arch", ["paper", "released"])
def test_pairs_fused_together_give_what_they_give_apart(arch, monkeypatch):
    model = LabelAnything(replace(CONFIG, arch=arch))
    batch = pack((MIXED,), features, mask, lambda _: (100, 200))
    assert len(batch.other_pair)
    assert len(batch.sparse_pair)
    calls = []
    model.fusion.register_forward_hook(lambda *_: calls.append(1))
    apart = model(batch)
    monkeypatch.setattr(LabelAnything, "fused_apart_on", ())
    together = model(batch)
    assert len(calls) == 3
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)


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
    other = torch.randn_like(image)
    assert not attention._absorbs(tokens)
    assert attention._absorbs(tokens[:, :4])
    for some, real in ((tokens, valid), (tokens[:, :4], valid[:, :4])):
        torch.testing.assert_close(attention.gather(some, image, other), attention(some, image, other))
        mixed = attention.spread(image, some, 2 * some, real)
        torch.testing.assert_close(mixed, attention(image, some, 2 * some, real))


@pytest.mark.parametrize("name", ["paper", "official"])
def test_a_checkpoint_of_before_the_arch_had_a_name_is_read(name):
    torch.manual_seed(0)
    small = {"two_way_ffn": 48, "block_ffn": 40} if name == "official" else {}
    model = build(preset(name, channels=CHANNELS, dim=32, depth=2, **small)).eval()
    saved = save_state(model)
    config = {key: value for key, value in saved["config"].items() if key != "arch"}
    old = {}
    for key, tensor in saved["state"].items():
        if name == "paper":
            key = key.replace("fusion.layers.0.", "fusion.").replace("fusion.layers.1.", "fusion.more.0.")
        key = key.replace("decoder.layers.0.", "decoder.attention.").replace("decoder.layers.1.", "decoder.more.0.")
        old[key] = tensor
    if name == "paper":
        config |= {"two_way_ffn": None, "block_ffn": None}
    again = load_state(saved | {"config": config, "state": old})
    assert again.config.arch == ("paper" if name == "paper" else "released")
    assert save_state(again)["state"].keys() == saved["state"].keys()
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in saved["state"].items())
    # the optimiser of a resumed run goes by the order of parameters, so that must be as it was too
    assert list(today_names(old)) == list(again.state_dict())
    batch = pack((MIXED,), features, mask, lambda _: (100, 200))
    assert torch.equal(again.eval()(batch), model(batch))
