import io
import shlex
from types import SimpleNamespace

import pytest
from fake_search import STEPS, TRIALS, fake_config, fake_train, quality
from fake_sweep import fake_store
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from typer.testing import CliRunner

import cli
from la.errors import InputError
from la.model.label_anything import preset
from pipelines.config import SettingSpace, TrainConfig
from pipelines.runs.identity import run_name
from sweeps.search.search_run import SearchResult
from sweeps.search.search_state import KEPT, Search, run_searched
from sweeps.search.space import own_points, train_command, train_config
from sweeps.trial import finished


def ignore(_):
    pass


def run_next(search, train=fake_train):
    trial = search.propose()
    result = run_searched(search, trial, ignore, train)
    search.settle(trial.number, result)
    return trial, result


def run(config, trials, train=fake_train):
    search = Search(config)
    return search, [run_next(search, train) for _ in range(trials)]


def result_of(search):
    again = Search(search.config)
    again.take_up()
    jobs = {job.name: job for job in again.jobs}
    results = {name: result for name, job in jobs.items() if (result := finished(job))}
    return SearchResult(again.config, again.name, again.folder, jobs, results, {}, False, again.importance())


def test_the_first_trials_are_the_presets_as_they_are(tmp_path):
    config = fake_config(tmp_path, presets=("paper", "official", "hybrid"))
    search, trials = run(config, 4)
    for name, (trial, _) in zip(config.space["preset"].values, trials, strict=False):
        train = search.job(trial).train
        plain = TrainConfig(workspace=tmp_path, preset=name, dim=preset(name).dim)
        same = {"lr", "weight_decay", "loss", "prompts", "batches", "recipe", "ema", "flips", "dim", "preset"}
        assert train.model_dump(include=same) == plain.model_dump(include=same)
    assert search.job(trials[3][0]).train.lr != search.job(trials[0][0]).train.lr


def test_proposals_are_the_same_whether_the_search_was_killed_or_not(tmp_path):
    _, at_once = run(fake_config(tmp_path / "a"), 12)
    points = []
    for _ in range(6):  # a search of two trials, again and again
        search = Search(fake_config(tmp_path / "b"))
        assert search.take_up() == []
        points += [run_next(search)[0].params for _ in range(2)]
    assert points == [trial.params for trial, _ in at_once]
    assert len({str(point) for point in points}) == 12
    _, other = run(fake_config(tmp_path / "c", seed=1), 4)
    assert other[2][0].params != points[2]


@pytest.fixture(scope="module")
def long_search(tmp_path_factory):
    return run(fake_config(tmp_path_factory.mktemp("long"), presets=("paper",)), 35)


def test_proposals_learn_from_the_results(long_search):
    search, trials = long_search
    found = [quality(search.job(trial).train) for trial, _ in trials[1:]]
    assert sum(found[-10:]) > sum(found[:10]) + 10
    assert max(found) > quality(train_config(search.config, own_points(search.config.spaces, {})[0]))


def test_poor_trials_are_stopped_early_and_never_win(long_search):
    search, trials = long_search
    stopped = [result for _, result in trials if result.stopped_early]
    whole = [result for _, result in trials if not result.stopped_early]
    assert {result.step for result in stopped} <= {STEPS // 6, KEPT * STEPS // 6}
    assert {result.step for result in whole} == {STEPS}
    assert len(stopped) >= 10
    assert sum(result.step for _, result in trials) < 0.6 * 35 * STEPS
    told = result_of(search)
    assert not told.results[told.ranked[0]].stopped_early
    assert told.results[told.ranked[0]].training["seen_miou"] == max(r.training["seen_miou"] for r in whole)
    assert told.ranked[-1] in {f"{r.variant}/fold0" for r in stopped}


def test_a_trial_that_was_killed_goes_on_with_its_settings(tmp_path):
    search, _ = run(fake_config(tmp_path), 3)
    killed = search.propose()

    def dies(config, on_report):
        on_report({"step": STEPS // 6, "loss": 1.0, "seen_miou": 35.0})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_searched(search, killed, ignore, dies)
    again = Search(search.config)
    (waiting,) = again.take_up()
    assert (waiting.number, waiting.params) == (killed.number, killed.params)
    assert waiting.intermediate_values == {STEPS // 6: 35.0}
    # killed once more after its training, before the driver could tell Optuna
    trained = run_searched(again, waiting, ignore, fake_train)
    assert again.study.trials[waiting.number].state.name == "RUNNING"
    last = Search(search.config)
    assert last.take_up() == []
    assert last.study.trials[waiting.number].state.name == ("PRUNED" if trained.stopped_early else "COMPLETE")
    assert len(last.jobs) == 4


def test_a_failed_trial_does_not_count(tmp_path):
    search, _ = run(fake_config(tmp_path), 2)
    search.settle(search.propose().number, None)
    again = Search(search.config)
    assert again.take_up() == []
    assert len(again.jobs) == 2
    assert again.propose().number == 3


@pytest.mark.parametrize("changes", [{}, {"presets": ("hybrid",), "seed": 3, "batch_scale": 0.5, "workers": 2}])
def test_the_printed_command_is_the_very_training(tmp_path, monkeypatch, changes):
    fake_store(tmp_path / "more")  # the key of whose store is in a run's name
    search, _ = run(fake_config(tmp_path, **changes, also=(tmp_path / "more",)), 3)
    found = []

    def caught(config, on_report=None, code="ask"):
        found.append(config)
        raise InputError("far enough")

    monkeypatch.setattr("pipelines.training.run.train", caught)
    for job in [search.job(trial) for trial in search.study.trials]:
        words = shlex.split(train_command(job.train))
        assert words[:2] == ["python", "cli.py"]
        CliRunner().invoke(cli.app, words[2:])
        assert run_name(found.pop()) == run_name(job.train)


def test_the_table_ranks_trials_and_weighs_settings(tmp_path, long_search):
    search, _ = long_search
    told = result_of(search)
    (table,) = told.tables
    assert len(table.rows) == 35
    assert all(len(row) == len(table.columns) for row in table.rows)
    whole = [float(row[1]) for row in table.rows if "*" not in row[1]]
    assert whole == sorted(whole, reverse=True)
    assert max(told.importance, key=told.importance.get) == "lr_times"
    assert "lr_times" in table.text()
    narrow = Console(width=80, file=io.StringIO())
    narrow.print(table.rich())
    assert "…" not in narrow.file.getvalue(), "a terminal has room for it"
    assert result_of(run(fake_config(tmp_path / "few"), 3)[0]).importance == {}


def test_more_trials_are_the_same_search_and_what_changes_a_result_is_not(tmp_path):
    name = Search(fake_config(tmp_path)).name
    for same in ({"trials": TRIALS + 5}, {"concurrent": 2}, {"threads": 2}, {"gpus": 0.5}):
        assert Search(fake_config(tmp_path, **same)).name == name
    for other in ({"steps": 61}, {"fold": 1}, {"seed": 1}, {"workers": 2}, {"presets": ("paper",)}):
        assert Search(fake_config(tmp_path, **other)).name != name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"presets": ("paper", "no_such")}, "no_such is unknown. Choose one of"),
        ({"space": {"learning_rate": [1, 2]}}, "learning_rate is not a setting"),
        ({"space": {"fold": [1, 2]}}, "fold is not a setting to search"),
        ({"space": {}}, "has no .space."),
        ({"space": {"preset": ["no_such"]}}, "no_such is unknown"),
        ({"space": {"loss": {"low": 1, "high": 2}}}, "loss is no number"),
        ({"space": {"clip": {"low": 1, "high": 2, "relative": "times"}}}, "clip has no value of its own"),
        ({"space": {"lr": {"low": -1, "high": 1}}}, "greater than 0"),
        ({"space": {"loss": ["focal", "no_such"]}}, "should be 'focal' or 'iou'"),
    ],
)
def test_a_wrong_space_is_told(tmp_path, changes, message):
    with pytest.raises((InputError, ValidationError), match=message):
        Search(fake_config(tmp_path, **changes))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("batches", [[[1, 1, 1]], [[2, 1, 1], [1, 2, 1]]]),
        ("betas", [[0.9, 0.99], [0.8, 0.9]]),
        ("prompts", [["mask"], ["mask", "box"]]),
        ("flips", [True, False]),
        ("clip", [None, 1.0]),
        ("dim", {"low": 16, "high": 64}),
        ("clip", {"low": 0.1, "high": 2.0}),
    ],
)
def test_any_setting_is_searched(tmp_path, name, values):
    search = Search(fake_config(tmp_path, space={name: values}, sampler="random"))
    drawn = [getattr(search.job(search.propose()).train, name) for _ in range(4)]
    if isinstance(values, dict):
        assert all(values["low"] <= value <= values["high"] for value in drawn if value)
    else:
        assert set(drawn) <= set(
            TypeAdapter(TrainConfig.model_fields[name].annotation).validate_python(v) for v in values
        )


def test_a_search_prints_its_settings_for_its_own_use_and_a_dry_run_trains_nothing(tmp_path, monkeypatch):
    fake_store(tmp_path)
    words = ["sweep", "search", "--workspace", str(tmp_path), "--set", "gamma=1.5", "--print-config"]
    printed = CliRunner().invoke(cli.app, words)
    assert printed.exit_code == 0, printed.output
    (tmp_path / "printed.toml").write_text(printed.output)
    again = CliRunner().invoke(
        cli.app, ["sweep", "search", "--config", str(tmp_path / "printed.toml"), "--print-config"]
    )
    assert again.output == printed.output
    (tmp_path / "mine.toml").write_text("[space]\ngamma = [1.0, 2.0]")
    words = ["sweep", "run", str(tmp_path / "mine.toml"), "--workspace", str(tmp_path)]
    dry = CliRunner().invoke(cli.app, [*words, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "30 trials of at most 2000 steps" in dry.output
    assert not list((tmp_path / "runs" / "searches").glob("*/trial-*"))
    assert CliRunner().invoke(cli.app, [*words, "--folds", "0,1"]).exit_code == 2


@pytest.mark.parametrize("wrong", [{}, {"low": 1}, {"low": 2, "high": 1}, {"low": 0, "high": 1, "log": True}, []])
def test_a_space_is_a_list_or_a_range(wrong):
    with pytest.raises(ValueError, match=r"expected a list of values, or low < high"):
        SettingSpace.model_validate(wrong)


def test_a_given_setting_is_not_searched_and_chance_may_propose(tmp_path):
    config = fake_config(tmp_path, sampler="random", early_stopping=False)
    config = config.model_copy(update={"train": {"lr": 1e-3, "gamma": 1.0}})
    search, trials = run(config, 12)
    assert {search.job(trial).train.lr for trial, _ in trials} == {1e-3}
    assert {search.job(trial).train.gamma for trial, _ in trials} == {1.0}
    assert not any(result.stopped_early for _, result in trials)
    assert len({search.job(trial).train.weight_decay for trial, _ in trials}) > 8


def test_a_training_knows_nothing_of_unseen_classes(tmp_path):
    search, trials = run(fake_config(tmp_path, fold=2), 3)
    for trial, _ in trials:
        job = search.job(trial)
        assert job.evaluations == ()
        assert (job.train.fold, job.train.classes) == (2, "seen")


def test_the_last_validation_is_not_asked(tmp_path):
    search, _ = run(fake_config(tmp_path), 6)

    def poor_at_the_end(config, on_report):
        on_report({"step": STEPS, "loss": 1.0, "seen_miou": 0.1})
        metrics = {"seen_miou": 0.1, "train_seconds": 1.0}
        return SimpleNamespace(
            run_dir=tmp_path, checkpoint=tmp_path / "best.pt", step=STEPS, metrics=metrics, code=None
        )

    _, result = run_next(search, poor_at_the_end)
    assert not result.stopped_early
