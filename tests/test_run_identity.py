"""What names a run, more steps of it, its code, weights to start from, and its experiment file."""

import gc
import json
import os
import re
import shutil
import tomllib
import warnings
import weakref
from pathlib import Path

import pytest
import torch

import pipelines.training.resume as resume
from la.errors import InputError
from la.model.label_anything import LabelAnything
from la.model.label_anything import preset as preset_of
from la.model.official_names import to_official
from pipelines.config import EvaluateConfig, TrainConfig
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.methods import latest_run
from pipelines.runs import code
from pipelines.runs.checkpoints import load
from pipelines.runs.identity import run_dir_of, run_name, settings_as_toml
from pipelines.runs.official_files import import_official
from pipelines.store.reader import FeatureStore
from pipelines.training.run import OtherSchedule, train
from pipelines.workspace import Workspace
from tests.test_checkpoints import parts_that_count, same, take_earlier_run
from tests.test_training import featurized_scenes, settings

ROOT = Path(__file__).parents[1]
OLD_NAME = "debug-fold0-seed3-0123abcd"  # by a digest of other settings


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return featurized_scenes(tmp_path_factory.mktemp("study"), train_images=80, val_images=48)


@pytest.fixture
def other_code(monkeypatch):
    """Pretend that the code was edited."""
    other = code.code_now().model_copy(update={"digest": "0ddc0de0"})
    return lambda: monkeypatch.setattr(resume, "code_now", lambda: other)


def test_only_what_changes_the_result_names_a_run(workspace):
    config = settings(workspace, schedule="constant")
    where = {"steps": 99, "minutes": 3, "checkpoint_every": 7, "threads": 2, "device": "cpu", "compile": True}
    store = Workspace(workspace).find_store().name
    for alike in ({"store": store}, {"workspace": Path(os.path.relpath(workspace))}, {"schedule_steps": 5}, where):
        assert run_name(config.model_copy(update=alike)) == run_name(config), alike
    others = (
        {"lr": 0.5},
        {"seed": 1},
        {"schedule": "cosine"},
        {"also": (workspace,)},
        {"workers": 2},
        {"val_every": 1},
    )
    names = {run_name(config.model_copy(update=other)) for other in others}
    assert len(names | {run_name(config)}) == 1 + len(others)
    cosine = settings(workspace)
    assert run_name(cosine.model_copy(update={"steps": 24})) != run_name(cosine)
    longer = {"steps": 6, "schedule_steps": cosine.steps}
    assert run_name(cosine.model_copy(update=longer)) == run_name(cosine)


@pytest.mark.parametrize("schedule", [{"schedule": "constant"}, {"schedule_steps": 26}])
@pytest.mark.parametrize("first", [8, 10, 13])  # which of them a validation or a report falls on differs
def test_a_run_of_more_steps_is_one_that_was_long_from_the_start(workspace, schedule, first):
    config = settings(workspace, lr=2e-3 + first / 1e5, steps=26, val_every=4, **schedule)
    whole = parts_that_count(train(config).run_dir)
    shutil.rmtree(run_dir_of(config))
    short = config.model_copy(update={"steps": first})
    assert train(short).step == first
    longer = train(config)
    assert longer.step == 26
    assert json.loads((longer.run_dir / "result.json").read_text())["starts"] == [0, first]
    assert same(parts_that_count(longer.run_dir), whole)
    assert same(load(longer.checkpoint)["state"], whole["best"]["state"])
    with pytest.raises(InputError, match=rf"trained for 26 steps, but --steps is {first}.*--name"):
        train(short)
    (longer.run_dir / "result.json").unlink()
    with pytest.raises(InputError, match="trained for 26 steps"):
        train(short)


def test_a_run_that_is_out_of_minutes_is_finished_until_it_is_given_more(workspace):
    config = settings(workspace, seed=31, minutes=1e-9)
    short = train(config)
    assert short.step == 4
    assert train(config) == short
    assert train(config.model_copy(update={"minutes": None})).step == 12


def test_a_longer_schedule_is_another_run_and_says_so(workspace):
    first = train(settings(workspace, seed=32))
    with pytest.warns(
        OtherSchedule,
        match=re.escape(
            f"12 steps in place of 13, so this run starts anew. To start from its weights, pass --init {first.run_dir}"
        ),
    ):
        assert train(settings(workspace, seed=32, steps=13)).run_dir != first.run_dir
    with warnings.catch_warnings():
        warnings.simplefilter("error", OtherSchedule)
        train(settings(workspace, seed=33, steps=4))


def test_a_name_is_the_folders_and_holds_one_run(workspace):
    config = settings(workspace, seed=34, name="mine.v1")
    run = train(config)
    assert run.run_dir == workspace / "runs" / "mine.v1"
    assert train(config) == run
    with pytest.raises(InputError, match=r"other settings: lr is 0\.0003 there, 0\.5 now; .*gamma is 2\.0 there, 1\.0"):
        train(config.model_copy(update={"lr": 0.5, "gamma": 1.0}))
    for bad in ("../up", "a b", "", ".hidden"):
        with pytest.raises(InputError, match="--name is"):
            train(config.model_copy(update={"name": bad}))
    (workspace / "runs" / "official").mkdir()
    (workspace / "runs" / "official" / "best.pt").touch()
    with pytest.raises(InputError, match="other files"):
        train(config.model_copy(update={"name": "official"}))


def test_a_run_under_an_earlier_versions_name_is_found_evaluated_and_goes_on(workspace):
    own = {"preset": "debug", "dim": 16, "depth": 2, "token_pool": False, "val_every": 4, "steps": 8}
    config = settings(workspace, seed=3, **own)
    run_dir = workspace / "runs" / OLD_NAME
    take_earlier_run(run_dir)
    assert run_dir_of(config) == run_dir
    assert run_dir_of(config.model_copy(update={"lr": 0.5})) != run_dir
    key, another = Workspace(workspace).find_store().name, workspace / "features" / "another"
    another.mkdir()
    (another / "store.json").touch()
    # it names no store, but was trained on one
    runs = [run_dir_of(config.model_copy(update={"store": store})) for store in (key, "another")]
    shutil.rmtree(another)
    assert [run == run_dir for run in runs] == [True, False]
    assert train(config).run_dir == run_dir
    assert json.loads((run_dir / "result.json").read_text())["starts"] == [0, 4]
    (run_dir / "identity.json").unlink()  # as an earlier version left it, finished
    assert train(config).code is None
    tested = EvaluateConfig(workspace=workspace, seeds=1, episodes=2, threads=1)
    assert latest_run(tested, FeatureStore(Workspace(workspace).find_store())) == run_dir
    assert evaluate(tested).method.startswith("debug@")


def test_nothing_holds_the_checkpoint_while_a_resumed_run_trains(workspace, monkeypatch):
    config = settings(workspace, seed=35, schedule="constant")
    train(config)
    real, read, alive = resume.load_last, [], []

    def watched(run_dir):
        saved = real(run_dir)
        read.append(weakref.ref(saved["training"]["neck.0.weight"]))
        return saved

    def look(_):
        gc.collect()
        alive.append(read[0]() is not None)

    monkeypatch.setattr(resume, "load_last", watched)
    train(config.model_copy(update={"steps": 24}), look)
    assert len(read) == 1
    assert alive
    assert not any(alive)


def test_a_run_of_other_code_is_asked_about(workspace, other_code):
    config = settings(workspace, seed=36)
    old = train(config)
    now = code.code_now()
    assert old.code == now.digest
    other_code()
    with pytest.raises(InputError, match=rf"was finished at {re.escape(str(now))}; the code is now 0ddc0de0.*--again"):
        train(config)
    assert train(config, code="keep") == old
    anew = train(config, code="again")
    assert (anew.code, anew.run_dir) == ("0ddc0de0", old.run_dir)
    beside = old.run_dir.with_name(f"{old.run_dir.name}-{now.digest}")
    assert same(parts_that_count(beside), parts_that_count(old.run_dir))
    assert json.loads((beside / "identity.json").read_text())["code"]["digest"] == now.digest
    assert train(config) == anew


def test_a_killed_run_goes_on_under_other_code_only_where_that_is_said(workspace, other_code):
    config = settings(workspace, seed=37)
    run_dir = train(config).run_dir
    (run_dir / "result.json").unlink()
    other_code()
    with pytest.raises(InputError, match="was begun at"):
        train(config)
    assert train(config, code="keep").code == f"{code.code_now().digest}+0ddc0de0"
    assert train(config).code == f"{code.code_now().digest}+0ddc0de0"


def test_the_digest_of_code_hears_of_constants_and_not_of_comments(tmp_path):
    copy = shutil.copytree(ROOT / "la" / "evaluation", tmp_path / "evaluation", ignore=shutil.ignore_patterns("__*"))

    def digest():
        return code.digest_of_files(sorted(copy.glob("*.py")), tmp_path)

    before, losses = digest(), copy / "losses.py"
    text = losses.read_text()
    losses.write_text(text.replace('"""', '"""Another docstring. ', 1).replace("    return", "    # here\n    return"))
    assert digest() == before
    changed = re.sub(r"(?m)^(\s+return .*)\b1\b", r"\g<1>2", text, count=1)
    assert changed != text
    losses.write_text(changed)
    assert digest() != before


def test_what_decides_a_result_is_in_the_digest():
    files = {str(file.relative_to(ROOT)) for pattern in code.DECIDING for file in ROOT.glob(pattern)}
    for name in ("la/evaluation/losses.py", "la/model/hybrid.py", "pipelines/training/loop.py", "la/schedules.py"):
        assert name in files
    assert all(list(ROOT.glob(pattern)) for pattern in code.DECIDING), "a pattern that names nothing"


@pytest.mark.parametrize("preset", ["debug", "hybrid"])
def test_fine_tuning_starts_from_the_weights_alone(workspace, monkeypatch, preset):
    first = train(settings(workspace, seed=38, preset=preset))
    monkeypatch.setattr(resume, "fit_matching", None)  # the weights of a hybrid are fitted already
    config = settings(workspace, seed=39, preset=preset, init=str(first.run_dir), lr=1e-12, weight_decay=0, steps=2)
    tuned = train(config)
    assert tuned.step == 2
    weights = load(first.checkpoint)["state"]
    for name, tensor in load(tuned.run_dir / "last.pt")["state"].items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-6, rtol=0)
    moved = workspace / f"{preset}.pt"
    shutil.copy(first.checkpoint, moved)
    assert train(config.model_copy(update={"init": str(moved)})) == tuned, "its contents name the run, not its path"
    assert run_name(config.model_copy(update={"init": None})) != run_name(config)


def test_weights_of_another_model_are_refused_by_what_differs(workspace):
    run = train(settings(workspace, seed=38))
    init = {"init": str(run.run_dir), "seed": 40}
    for changes, message in (
        ({"dim": 16}, "dim is 32 there, 16 here"),
        ({"preset": "hybrid"}, "kind is ModelConfig there, HybridConfig here"),
        ({"token_pool": False}, "token_pool is True there, False here"),
        ({"fold": 1}, "trained with fold 0, so it has seen classes that fold 1 leaves unseen"),
        ({"init": "nowhere.pt"}, "nowhere.pt is not there"),
    ):
        config = settings(workspace, **(init | changes))
        with pytest.raises(InputError, match=re.escape(message)):
            train(config)
    assert train(settings(workspace, **init, fold=1, classes="all", steps=1)).step == 1


def test_an_imported_official_checkpoint_is_fine_tuned(workspace, tmp_path):
    torch.manual_seed(0)
    state = to_official(LabelAnything(preset_of("official", channels=128, dim=32)))
    torch.save(state, tmp_path / "released.pt")
    import_official(str(tmp_path / "released.pt"), 0, tmp_path / "imported" / "best.pt")
    config = settings(workspace, preset="official", dim=32, init=str(tmp_path / "imported"), steps=1)
    assert train(config).step == 1
    with pytest.raises(InputError, match="dim is 32 there, 256 here"):
        train(config.model_copy(update={"dim": None}))


@pytest.mark.parametrize(
    "changes", [{}, {"preset": "hybrid", "also": ("/elsewhere",)}, {"recipe": "paper", "lr": 3e-5}]
)
def test_an_experiment_file_says_what_differs_and_is_read_back(tmp_path, changes):
    config = TrainConfig(workspace=tmp_path, **changes)
    text = settings_as_toml(config)
    assert TrainConfig(workspace=tmp_path, **tomllib.loads(text)) == config
    always = {"preset": config.preset, "recipe": config.recipe, "fold": 0, "seed": 0}
    assert tomllib.loads(text).keys() == always.keys() | changes.keys()


def test_a_runs_folder_holds_its_experiment_file(workspace):
    config = settings(workspace, seed=41, steps=1)
    run = train(config)
    content = tomllib.loads((run.run_dir / "config.toml").read_text())
    assert run_name(TrainConfig(workspace=workspace, **content)) == run_name(config)
    assert content["store"] == Workspace(workspace).find_store().name
