"""Label Anything from the shell: one verb per stage, from a COCO folder to tables in MLflow.

featurize, episodes, train, evaluate: one model.  featurize, sweep ablations, ui: the paper's ablation tables.
demo: all of it on scenes drawn on the spot, without a download.
"""

import sys
from pathlib import Path

import typer

from commands import bench, data, models, planning, prediction, studies

PARTS = (data, models, studies, planning, prediction, bench)
app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_show_locals=False, add_completion=False)
for part in PARTS:
    app.add_typer(part.app)
app.add_typer(studies.sweep_app, name="sweep")

if __name__ == "__main__":
    app(prog_name=Path(sys.argv[0]).name)
