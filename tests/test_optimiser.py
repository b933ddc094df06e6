"""The optimiser's options, and the end of a training whose numbers are no longer finite."""

from copy import deepcopy

import pytest
import torch

from la.errors import Diverged
from la.model.label_anything import build, preset
from pipelines.runs.checkpoints import load
from pipelines.store.reader import FeatureStore
from pipelines.training.optimiser import optimiser_of
from pipelines.training.prepare import prepare, run_dir_of
from pipelines.training.resume import LastCheckpoint, begin
from pipelines.training.run import train
from tests.test_training import featurized_scenes, settings, stopped_after_a_checkpoint, train_on_two


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return featurized_scenes(tmp_path_factory.mktemp("study"), train_images=80, val_images=48)


def gradients(config):
    """Of the first step, by the number of the parameter."""
    state = load(run_dir_of(config) / "last.pt")["optimiser"]["state"]
    return {number: each["exp_avg"] / 0.1 for number, each in state.items()}


@pytest.mark.parametrize(("workers", "size"), [(0, 2), (2, 1)])
@pytest.mark.parametrize("loss", ["focal", "iou"])
def test_two_batches_of_a_step_have_the_gradients_of_one_that_is_as_large(workspace, workers, size, loss):
    one = settings(workspace, preset="official", dim=32, batches=((4, 1, 1), (4, 2, 1)), steps=1, loss=loss, threads=1)
    batches = ((size, 1, 1), (size, 2, 1))
    two = one.model_copy(update={"batches": batches, "workers": workers, "accumulate": 2, "train_batches": 24})
    train(one)
    if workers:
        train_on_two(two)
    else:
        train(two)
    whole, parts = gradients(one), gradients(two)
    largest = max(gradient.abs().max().item() for gradient in whole.values())
    assert largest > 1e-5
    for number in whole.keys() | parts.keys():  # what no episode used has a zero or nothing
        ours, theirs = (found.get(number, torch.zeros(1)) for found in (parts, whole))
        torch.testing.assert_close(ours.expand_as(theirs), theirs, atol=1e-4 * largest, rtol=0)
    losses = [load(run_dir_of(config) / "last.pt")["at"]["curve"][-1]["loss"] for config in (one, two)]
    assert workers or losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_gradients_are_clipped_to_their_norm_and_left_alone_below_it(workspace):
    def norm(config):
        train(config)
        return torch.cat([g.flatten() for g in gradients(config).values()]).norm().item()

    plain = settings(workspace, steps=1)
    full = norm(plain)
    assert norm(plain.model_copy(update={"clip": full / 3})) == pytest.approx(full / 3, rel=1e-4)
    high = plain.model_copy(update={"clip": full * 3})
    train(high)
    ours, theirs = (load(run_dir_of(config) / "last.pt")["training"] for config in (high, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", ["paper", "official", "hybrid"])
def test_norms_biases_and_tokens_do_not_decay_with_matrices_alone(workspace, name):
    model = build(preset(name, channels=12))
    config = settings(workspace, weight_decay=0.5, decay="matrices")
    decayed, spared = optimiser_of(model, config).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.5, 0.0)
    assert {names[id(p)] for g in (decayed, spared) for p in g["params"]} == set(names.values())
    assert all(p.ndim >= 2 and names[id(p)].endswith("weight") for p in decayed["params"])
    tokens = ("types", "pool.rows", "no_mask", "no_sparse", "absent_mask", "absent_point")
    for p in spared["params"]:
        assert p.ndim == 1 or names[id(p)].endswith(tokens), names[id(p)]
    (whole,) = optimiser_of(model, settings(workspace)).param_groups
    assert [names[id(p)] for p in whole["params"]] == list(names.values())


def test_a_run_with_all_options_goes_on_where_it_stopped(workspace, monkeypatch):
    config = settings(
        workspace, preset="paper", dim=32, decay="matrices", betas=(0.8, 0.95), clip=0.1, accumulate=2, train_batches=30
    )
    run_dir = train(config).run_dir
    expected = load(run_dir / "last.pt")
    assert [len(g["params"]) > 0 for g in expected["optimiser"]["param_groups"]] == [True, True]
    for file in (*run_dir.glob("*.pt"), run_dir / "result.json"):
        file.unlink()
    with stopped_after_a_checkpoint(monkeypatch):
        train(config)
    assert load(run_dir / "last.pt")["step"] == 4
    train(config)
    resumed = load(run_dir / "last.pt")["training"]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected["training"].items())


def test_the_state_of_an_optimiser_that_went_from_parameter_to_parameter_is_gone_on_with(workspace):
    prepared = prepare(settings(workspace, seed=5, steps=1))
    state = begin(prepared, LastCheckpoint(prepared), torch.device("cpu"))
    plain = deepcopy(state.model)
    earlier = torch.optim.AdamW(plain.parameters(), 0.01, weight_decay=0.1)

    def step(model, optimiser):
        for p in model.parameters():
            p.grad = p.detach().cos()
        optimiser.step()

    step(plain, earlier)
    saved = {"training": plain.state_dict(), "optimiser": earlier.state_dict()}
    state.load_state_dict(state.state_dict() | deepcopy(saved))
    assert state.optimiser.param_groups[0]["foreach"]
    step(plain, earlier)
    step(state.model, state.optimiser)
    for ours, theirs in zip(state.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_training_that_diverges_ends_before_a_checkpoint_of_it_and_says_what_to_do(workspace):
    config = settings(workspace, lr=1e30, warmup_steps=0, steps=40, train_batches=40, checkpoint_every=1, val_every=40)
    with pytest.raises(Diverged, match=r"step \d+ has the loss .*\.jpg.* Lower --lr, which is 1e\+30, or pass --clip"):
        train(config)
    run_dir = run_dir_of(config)
    saved = load(run_dir / "last.pt")
    assert all(tensor.isfinite().all() for tensor in saved["training"].values())
    with pytest.raises(Diverged, match=f"step {saved['step'] + 1} has"):
        train(config)
    assert load(run_dir / "last.pt")["step"] == saved["step"]
    assert not (run_dir / "result.json").exists()


def test_features_that_are_not_finite_are_found(workspace, monkeypatch):
    config = settings(workspace, seed=3, steps=40, train_batches=40, checkpoint_every=7, val_every=40)
    real = FeatureStore.read_encoded
    bad = prepare(config).shards[0].batch(0, 9)[0].query

    def read_encoded(self, ids):
        return torch.stack([real(self, [i])[0] * (torch.nan if i == bad else 1) for i in ids])

    monkeypatch.setattr(FeatureStore, "read_encoded", read_encoded)
    with pytest.raises(
        Diverged, match=rf"The features of image {bad} \(.*\.jpg\) are not finite: run .*verify"
    ) as error:
        train(config)
    step = int(str(error.value).split("step ")[1].split()[0])
    saved = run_dir_of(config) / "last.pt"
    assert load(saved)["step"] == (step - 1) // 7 * 7
    assert all(tensor.isfinite().all() for tensor in load(saved)["training"].values())
