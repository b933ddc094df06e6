"""The command line: every verb teaches, the smallest demo runs whole, mistakes are one message and exit code 2."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import cli
from commands import studies
from tests.conftest import browser_page

ROOT = Path(__file__).parents[1]
runner = CliRunner()


def run(*arguments):
    return runner.invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "200", "LA_WORKSPACE": ""})


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The workspace of a demo run at its smallest size, and what it printed."""
    root = tmp_path_factory.mktemp("demo")
    result = run("demo", "--smallest", "--workspace", root)
    assert result.exit_code == 0, result.output
    return root, result.output


def verbs():
    plain = [("", part.app) for part in cli.PARTS]
    for group, app in [*plain, ("sweep ", studies.sweep_app)]:
        for command in app.registered_commands:
            yield f"{group}{command.name or command.callback.__name__}"


@pytest.mark.parametrize("verb", sorted(verbs()))
def test_every_verb_explains_itself(verb):
    result = run(*verb.split(), "--help")
    assert result.exit_code == 0
    assert "--" in result.output


def test_the_command_line_starts_without_torch():
    code = "import sys, cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0, "it takes a second or two to load"


def test_the_smallest_demo_makes_tables_picture_and_runs(demo):
    root, output = demo
    for words in ("Table 5", "Table 6", "prototype", "python cli.py ui --workspace"):
        assert words in output
    assert (root / "artifacts" / "demo-episodes.png").stat().st_size > 20_000
    assert len(list((root / "runs" / "sweeps").glob("*/*.csv"))) == 3


def test_a_second_demo_repeats_nothing(demo):
    root, _ = demo
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*.parquet")} | {
        p: p.stat().st_mtime_ns for p in root.rglob("last.pt")
    }
    assert run("demo", "--smallest", "--workspace", root).exit_code == 0
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_verbs_go_on_from_the_demo(demo):
    root, _ = demo
    drawn = run("episodes", "--folds", "0", "--train-batches", 12, "--seeds", 1, "--episodes", 5, "--workspace", root)
    assert drawn.exit_code == 0, drawn.output
    assert "training" in drawn.output
    quick = ("--preset", "debug", "--steps", 3, "--workspace", root, "--val-episodes", 3)
    trained = run("train", "--fold", 0, *quick)
    assert trained.exit_code == 0, trained.output
    picture = root / "e.png"
    test = ("--seeds", 2, "--episodes", 4, "--workspace", root, "--picture", picture)
    tested = run("evaluate", "--fold", 0, *test)
    assert tested.exit_code == 0, tested.output
    assert re.search(r"mIoU \d+\.\d+ \+- \d+\.\d+ over 2 seeds x 4 episodes", tested.output)
    assert picture.exists()
    mixed = ("--ways", 2, "--shots", 2, "--prompt", "mixed", "--supports", "varied")
    shown = run("evaluate", "--fold", 0, *test, *mixed)
    assert shown.exit_code == 0, shown.output
    measured = run("bench", "episodes", "--workspace", root, "--repeats", 1)
    assert "episodes" in measured.output


def test_the_report_holds_every_table_and_says_how_to_fill_empty_ones(demo):
    root, _ = demo
    result = run("report", "--workspace", root)
    assert result.exit_code == 0, result.output
    text = (root / "report.html").read_text()
    for title in ("Table 1", "Table 2", "Table 3", "Table 4", "Table 5", "Table 6", "Figure 3"):
        assert title in text
    assert f"python cli.py sweep folds --workspace {root}" in text
    five = text[text.index("<caption>Table 5") : text.index("<caption>Table 6")]
    assert "39.2" in five
    assert "not run" not in five
    assert "data:image/jpeg;base64," in text
    assert text.count("<svg") >= 2
    assert not re.search(r'(src|href|xlink:href)="(?!#|data:)', text), "nothing is fetched"


@pytest.mark.parametrize("width", [1280, 400])
def test_the_report_opens_in_a_browser(demo, width):
    root, _ = demo
    with browser_page(width) as (page, complaints):
        assert run("report", "--workspace", root).exit_code == 0
        page.goto((root / "report.html").as_uri())
        captions = page.locator("caption").all_inner_texts()
        for title in ("Table 1", "Table 3", "Table 4", "Table 5", "Table 6", "Figure 3"):
            assert any(caption.startswith(title) for caption in captions), title
        assert page.locator("figure svg").count() >= 2
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "wide tables scroll by themselves"
        picture = page.locator("figure img").first
        assert picture.evaluate("image => image.naturalWidth") > 300
        assert complaints == []


MISTAKES = {
    "no COCO folder": (["featurize", "--coco-dir", "{tmp}/nowhere"], "is not a folder"),
    "no split": (["featurize", "--coco-dir", "{tmp}"], "has no train split"),
    "empty workspace": (["train"], "holds no features"),
    "empty workspace, sweep": (["sweep", "ablations"], "holds no features"),
    "nothing tracked": (["ui"], "mlflow.db"),
    "nothing to report": (["report"], "holds no features"),
    "unknown preset": (["model", "--preset", "huge"], "Choose one of"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_message_and_exit_code_2(mistake, tmp_path):
    arguments, message = MISTAKES[mistake]
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    if arguments[0] not in ("featurize", "model"):
        arguments += ["--workspace", str(tmp_path / "empty")]
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "empty" / "runs").exists(), "nothing was begun"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--fold", 4], "folds 0 to 3"),
        (["evaluate", "--fold", 0, "--method", "magic"], "--method magic is unknown"),
        (["evaluate", "--method", "prototype", "--ways", 20, "--shots", 30], "Lower ways or shots"),
        (["evaluate", "--checkpoint", "nowhere.pt"], "is not there"),
        (["sweep", "ablations", "--folds", "a"], "--folds is 'a': Input should be a valid integer"),
        (["sweep", "ablations", "--folds", "7"], "0, 1, 2 and 3"),
        (["train", "--device", "cuda:9"], "device cuda:9 cannot be used"),
        (["train", "--dim", 100], "multiple of 16"),
        (["train", "--batch-scale", 0], "--batch-scale"),
        (["train", "--epochs", "nan"], "--epochs is nan"),
        (["train", "--epochs", -3], "--epochs is -3"),
        (["push", "s3://"], "names no bucket"),
        (["train", "--lr", 0], "--lr is 0.0: Input should be greater than 0"),
        (["sweep", "nway", "--ways", "0"], "--ways is '0': Input should be greater than or equal to 1"),
        (["evaluate", "--method", "prototype", "--pool-draws", 2], "of trained models"),
        (["train", "--store", "other"], "is not in"),
    ],
)
def test_mistakes_in_a_filled_workspace(demo, arguments, message):
    result = run(*arguments, "--workspace", demo[0])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())


def test_the_readme_names_only_verbs_and_options_that_exist():
    text = (ROOT / "README.md").read_text()
    known = set(verbs())
    for line in re.findall(r"^\S*python cli\.py (.+?)(?:\s+#.*)?$", text, re.MULTILINE):
        words = line.split()
        verb = " ".join(words[:2]) if words[0] == "sweep" else words[0]
        assert verb in known, line
        help_text = run(*verb.split(), "--help").output
        for option in re.findall(r"--[a-z-]+", line):
            assert option in help_text, f"{line}: {option}"


def test_the_readme_tells_of_every_verb():
    table = set(re.findall(r"^\| `([a-z -]+)`", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert set(verbs()) <= table


def test_troubleshooting_names_only_options_that_exist():
    known = {"--head"}  # of ray start
    commands = [typer.main.get_command(cli.app)]
    for command in commands:
        commands += getattr(command, "commands", {}).values()
        known |= {option for parameter in command.params for option in parameter.opts}
    named = re.findall(r"--[a-z][a-z-]+", (ROOT / "docs" / "troubleshooting.md").read_text())
    assert set(named) <= known


def test_troubleshooting_quotes_messages_as_they_are():
    files = [path for part in ("la", "pipelines", "sweeps", "commands") for path in (ROOT / part).rglob("*.py")]
    source = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in files))
    told = re.findall(r"^\| `(.+?)`[^|]* \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(told) > 10
    for message in told:
        # without what a message fills in: names in capitals, numbers, files
        parts = re.split(r"\.\.\.|\b[A-Z]+\b|\b\d+(?:x\d+)?\b|vit_\S+|\bauto\b|\w+_\w+|\btrain\b|s3://", message)
        for part in (part.strip(" :`") for part in parts):
            assert part in source, f"{message!r}: nothing says {part!r}"
