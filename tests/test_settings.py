"""A setting is said once: the line in its class is enough for the command line, files, MLflow, studies and the docs."""

import re

import pytest
import typer
from typer.testing import CliRunner

import cli
from commands import options
from la.errors import InputError
from pipelines import config as settings
from pipelines import experiment_file
from pipelines.config import EvaluateConfig, SweepConfig, TrainConfig, setting
from pipelines.tracking import run_contents
from sweeps import study
from tools import settings_table


class WithSwitch(TrainConfig):
    """Training with one setting more."""

    sharpen: int = setting(3, "Times that the truth is sharpened.", ge=1)


def run(app, *arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160", "LA_WORKSPACE": ""})


def app_of(kind, **how):
    app, got = typer.Typer(), []

    @options.verb(app, kind, **how)
    def verb(config: kind) -> None:
        """A verb."""
        got.append(config)

    return app, got


def test_one_line_makes_a_setting_known_everywhere(monkeypatch, tmp_path):
    for module in (settings, options, experiment_file, study, run_contents):
        monkeypatch.setattr(module, "TrainConfig", WithSwitch)
    app, got = app_of(WithSwitch, from_file=True)
    assert re.search(r"--sharpen .*Times that the truth", run(app, "--help").output)
    assert run(app, "--sharpen", 4).exit_code == 0
    assert run(app, "--set", "sharpen=5").exit_code == 0
    file = tmp_path / "run.toml"
    file.write_text(run(app, "--sharpen", 6, "--print-config").output)
    assert "# Times that the truth is sharpened.\nsharpen = 6" in file.read_text()
    assert run(app, "--config", file).exit_code == 0
    assert [config.sharpen for config in got] == [4, 5, 6]
    sweep, swept = app_of(SweepConfig, training=("steps",), from_file=True)
    assert run(sweep, "--set", "sharpen=7").exit_code == 0
    assert swept[0].train == {"sharpen": "7"}
    mine = study.Study(name="mine", train={"sharpen": 8}, grid={"sharpen": [1, 2]})
    assert [v.settings["sharpen"] for v in mine.all_variants()] == [1, 2]
    assert run_contents.changed(WithSwitch(sharpen=2)) == ("sharpen",)
    assert run_contents.settings_of(WithSwitch(sharpen=2))["train"]["sharpen"] == 2
    assert "| `sharpen` | `3` | ≥ 1 | Times that the truth is sharpened. |" in settings_table.table(WithSwitch)


def test_a_given_option_wins_over_an_assignment_and_that_over_the_file_and_that_over_the_recipe(tmp_path):
    app, got = app_of(TrainConfig, from_file=True)
    file = tmp_path / "run.toml"
    file.write_text('recipe = "paper"\nlr = 1e-2\nwarmup_steps = 7\nsteps = 5\nfolds = 1')
    assert "folds is not a setting of TrainConfig. Nearest: fold, fold_lists" in run(app, "--config", file).output
    file.write_text('recipe = "paper"\nlr = 1e-2\nwarmup_steps = 7\nsteps = 5')
    assert run(app, "--config", file, "--lr", 1e-3, "--set", "warmup_steps=8", "--set", "lr=5").exit_code == 0
    config = got[0]
    assert (config.lr, config.warmup_steps, config.steps, config.class_weights) == (1e-3, 8, 5, "inverse")


def test_paths_are_whole_as_workers_have_other_working_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(init="best.pt", also=("other",))
    assert (config.init, config.also) == (f"{tmp_path}/best.pt", (tmp_path / "other",))
    assert TrainConfig(init="demo").init == "demo"


def test_a_sweep_and_an_evaluation_take_what_they_print(tmp_path):
    file = tmp_path / "printed.toml"
    for verb, given in (
        (["evaluate"], ["--set", "ways=2"]),
        (["sweep", "prompts"], ["--set", "gamma=1.5", "--lr", "0.1"]),
    ):
        printed = run(cli.app, *verb, *given, "--print-config").output
        file.write_text(printed)
        assert run(cli.app, *verb, "--config", file, "--print-config").output == printed
    assert "gamma" in printed


def test_every_setting_of_training_is_an_option_and_reachable_from_a_sweep():
    help_text = run(cli.app, "train", "--help").output
    for name in settings.fields_of(TrainConfig):
        assert options.flag_of(TrainConfig, name)[:20] in help_text, name
        assert experiment_file.assignment(f"{name}=1")[0] == name


@pytest.mark.parametrize(
    ("text", "message"),
    [("learning_rate=1", "such as"), ("lr", "expected NAME=VALUE"), ("gama=2", "gamma"), ("val-evry=5", "val_every")],
)
def test_a_wrong_assignment_gets_the_nearest_right_names(text, message):
    with pytest.raises(InputError, match=message):
        experiment_file.assignment(text)


def test_lists_are_read_from_text():
    config = TrainConfig(batches="4x1x4, 2x4x2", prompts="mask,box", betas="0.8,0.9")
    assert config.batches == ((4, 1, 4), (2, 4, 2))
    assert config.prompts == ("mask", "box")
    assert config.betas == (0.8, 0.9)
    assert TrainConfig(recipe="paper", batch_scale=0.5).batches[0] == (2, 1, 4)
    assert TrainConfig.model_validate_json(TrainConfig(recipe="paper", batch_scale=0.5).model_dump_json()).batches[
        0
    ] == (2, 1, 4)


def test_a_file_of_settings_gives_the_very_settings():
    for config in (
        TrainConfig(preset="hybrid", also=("a",), clip=1.0),
        EvaluateConfig(ways=3),
        SweepConfig(folds=(1, 2)),
    ):
        assert type(config)(**experiment_file.tomllib.loads(experiment_file.as_file(config))) == config


def test_the_page_of_settings_is_up_to_date():
    assert settings_table.FILE.read_text() == settings_table.page(), "python -m tools.settings_table"


def test_one_flag_has_one_type_everywhere():
    kinds: dict[str, set[str]] = {}
    commands = [typer.main.get_command(cli.app)]
    for command in commands:
        commands += getattr(command, "commands", {}).values()
        for parameter in command.params:
            for flag in parameter.opts:
                kind = getattr(parameter, "type_descriptor", None) or parameter.type  # of older versions of typer
                kinds.setdefault(flag, set()).add(str(getattr(kind, "annotation", type(kind))))
    several = {flag for flag, names in kinds.items() if len(names) > 1}
    # one number, or several with commas where a verb takes several; a path, or "demo" where that is one; see --help
    assert several <= {"--ways", "--shots", "--folds", "--checkpoint", "--fold-classes"}
