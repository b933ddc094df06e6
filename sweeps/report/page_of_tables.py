"""One HTML file of everything a workspace holds: the paper's tables beside ours, plots, curves, a gallery."""

import base64
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from pipelines.config import SweepConfig
from pipelines.store.reader import FeatureStore
from pipelines.tracking.job_runs import read_curve
from pipelines.workspace import Workspace, write_text
from sweeps.paper_tables import Table, scores_of, tables_of
from sweeps.plan import plan_sweep
from sweeps.report import plots
from sweeps.results import SweepResult
from sweeps.study import BUILT_IN, Study, find_study, task_title
from sweeps.trial import finished

GAPS = ("not run", "failed")


@dataclass(frozen=True)
class Section:
    """One study in the report: what was measured, or the empty tables and the command that fills them."""

    study: Study
    result: SweepResult
    command: str
    tables: list[Table]
    plots: list[Markup]
    gallery: list[tuple[str, str]]  # caption, data URI of a JPEG
    others: list[Path]  # folders of the sweeps of this study before `result`

    @property
    def missing(self) -> bool:
        return any(cell.startswith(GAPS) for table in self.tables for row in table.rows for cell in row)


def write_report(root: Path, out: Path) -> Path:
    """Write the report of a workspace to `out`; nothing is run again and nothing fetched.

    A sweep whose files cannot be read is left out, with a warning. Raises InputError for a workspace without features.
    """
    workspace = Workspace(root)
    stores = sorted(path.parent for path in workspace.features.glob("*/store.json"))
    if not stores:
        workspace.find_store()  # says what to do
    sweeps = _sweeps(workspace)
    studies = {name: find_study(name) for name in BUILT_IN} | {name: of[0][0].study for name, of in sweeps.items()}
    sections = [_section(workspace, study, sweeps.get(name, [])) for name, study in studies.items()]
    environment = Environment(loader=PackageLoader("sweeps.report", "."), autoescape=select_autoescape(["html"]))
    text = environment.get_template("report.html").render(
        sections=sections,
        stores=[FeatureStore(path) for path in stores],
        profile=_profile(workspace),
        workspace=workspace.root,
        gaps=GAPS,
    )
    write_text(out, text)
    return out


def _sweeps(workspace: Workspace) -> dict[str, list[tuple[SweepResult, str | None]]]:
    """study -> its sweeps, the one started last first, each with the command line that ran it where it is known.

    Those whose features are gone are left out.
    """
    by_study: dict[str, list[tuple[SweepResult, str | None]]] = {}
    files = (workspace.runs / "sweeps").glob("*/sweep.json")
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            content = json.loads(file.read_text())
            config = SweepConfig.model_validate(content["config"])
            study = Study.model_validate(content["study"]) if "study" in content else find_study(config.study)
        except (ValueError, KeyError, TypeError) as error:
            logging.getLogger(__name__).warning("%s is left out: not the settings of a sweep (%.200s)", file, error)
            continue
        if not (workspace.features / str(config.store) / "store.json").exists():
            continue
        plan = plan_sweep(config.model_copy(update={"workspace": workspace.root}), study)
        jobs = [replace(job, file=file.with_name(job.file.name)) for job in plan.jobs]
        results = {job.name: trial for job in jobs if (trial := finished(job))}
        result = SweepResult(config, file.parent.name, file.parent, study, plan.variants, results, {}, False)
        by_study.setdefault(study.name, []).append((result, content["command"]))
    return by_study


def _section(workspace: Workspace, study: Study, sweeps: list[tuple[SweepResult, str | None]]) -> Section:
    command = f"python cli.py sweep {study.name} --workspace {workspace.root}"
    if not sweeps:
        config = SweepConfig(workspace=workspace.root, study=study.name, **study.evaluation())
        empty = SweepResult(config, "", Path(), study, study.all_variants(), {}, {}, False)
        return Section(study, empty, command, tables_of(empty), [], [], [])
    (result, ran), *others = sweeps
    folders = [other.folder for other, _ in others]
    drawn, gallery = _plots(study, result), _gallery(result)
    return Section(study, result, ran or command, tables_of(result), drawn, gallery, folders)


def _plots(study: Study, result: SweepResult) -> list[Markup]:
    drawn = []
    if len(result.config.ways) > 2:
        lines = {
            v.title: [(n, s[0].miou) for n in result.config.ways if (s := scores_of(result, v.name, (n, 1)))]
            for v in result.variants
        }
        drawn.append(plots.lines(lines, "ways", "mIoU in %"))
    curves = {name: read_curve(trial.run_dir) for name, trial in result.results.items() if trial.run_dir}
    if any(curves.values()):
        drawn.append(plots.curves(curves))
    per_class = {
        name.split("/")[0]: trial.scores[0].per_class
        for name, trial in result.results.items()
        if trial.fold == result.config.folds[0] and trial.scores
    }
    if per_class:
        task = task_title(result.config.ways[0], result.config.shots[0])
        drawn.append(plots.bars(per_class, f"IoU in %, fold {result.config.folds[0]}, {task}"))
    return drawn


def _gallery(result: SweepResult) -> list[tuple[str, str]]:
    pictures = []
    for variant in result.variants:
        file = result.folder / f"{variant.name}-fold{result.config.folds[0]}.jpg"
        if file.exists():
            encoded = base64.b64encode(file.read_bytes()).decode()
            pictures.append((f"{variant.title}, fold {result.config.folds[0]}", f"data:image/jpeg;base64,{encoded}"))
    return pictures[:1]  # of the first variant: the file stays small enough to send


def _profile(workspace: Workspace) -> dict | None:
    """What `profile` measured, and its plots, where it was run."""
    file = workspace.artifacts / "profile.json"
    if not file.exists():
        return None
    content = json.loads(file.read_text())
    return content | {"plots": plots.profile(content["rows"])}
