"""Photos to masks by examples, the web page, and the heads for other programs."""

from pathlib import Path
from typing import Annotated

import typer

from commands.options import AddressOption, mistakes, progress_bar, say, verb
from pipelines.config import PredictConfig, ServeConfig

app = typer.Typer()


@verb(app, PredictConfig, goes_on=True)
def predict(config: PredictConfig) -> None:
    """Segment photos by a few annotated ones. Killed and started again, it goes on where it was."""
    from la.predictor.checkpoint import DEMO
    from pipelines.predict.segment_folder import predict as run

    with progress_bar("rate") as bar:
        task = bar.add_task("predict", total=None, rate="loading the model")

        def progress(done: int, total: int, rate: float) -> None:
            bar.update(task, completed=done, total=total, rate=f"{rate:.1f} photos/s")

        report = run(config, progress)
    if config.checkpoint == DEMO:
        say("note: the demo model knows drawn scenes; for photos pass --checkpoint, a run of your own")
    rate = f" at {report.photos_per_second:.2f} photos/s" if report.made else ""
    say(f"{report.made} photos segmented{rate}, {report.already} there already: {report.results.parent}")
    if report.skipped:
        say(f"note: {len(report.skipped)} photos could not be used and were left out")
        say(*(f"  skipped {name}: {reason}" for name, reason in report.skipped.items()))


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="File to write: .onnx, or .pt2 by torch.export.")],
    checkpoint: Annotated[str, typer.Option(help=PredictConfig.model_fields["checkpoint"].description)] = "demo",
    ways: Annotated[int | None, typer.Option(min=1, help="Number of classes; default: those of --prototypes.")] = None,
    shots: Annotated[int, typer.Option(min=1, help="Support images of each class, which a hybrid's file fixes.")] = 1,
    prototypes: Annotated[
        list[Path] | None, typer.Option(help="Saved classes, whose inputs go into an .npz beside; may be repeated.")
    ] = None,
    grid: Annotated[
        int | None, typer.Option(min=1, help="Side of feature maps in tokens, for checkpoints that do not say it.")
    ] = None,
) -> None:
    """Write the heads for other programs: features of a query and of saved classes in, logits out."""
    with mistakes():
        from pipelines.predict.export import export_heads

        report = export_heads(checkpoint, out, ways, shots, prototypes or (), grid)
        say(f"{report.heads}{f' and {report.classes}' if report.classes else ''}")
        if report.difference is not None:
            say(f"differs from the model by at most {report.difference:.1e} on a random input")


@verb(app, ServeConfig)
def serve(config: ServeConfig, address: AddressOption = None) -> None:
    """Open a web page, and beside it an HTTP API, to label a few photos and have others segmented."""
    from pipelines.serve.server import serve as run

    run(config, lambda url: say(f"page: {url}  API: {url}/api/openapi.json  Ctrl-C ends it"))
