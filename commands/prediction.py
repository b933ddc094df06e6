"""Photos to masks by examples, and the heads for other programs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from commands.options import DeviceOption, ThreadsOption, WeightsOption, console, mistakes, progress_bar

app = typer.Typer()
CheckpointOption = Annotated[
    str, typer.Option("--checkpoint", help="A run's folder, its best.pt, or demo, which comes with the product.")
]
OwnBackboneOption = Annotated[
    str | None, typer.Option("--backbone", help="For checkpoints that do not name theirs, such as released ones.")
]
OwnSizeOption = Annotated[
    int | None, typer.Option("--image-size", help="In pixels, for checkpoints that do not say theirs.")
]


@app.command()
def predict(
    images: Annotated[Path, typer.Option(help="A folder of photos, or one photo.")],
    out: Annotated[Path, typer.Option(help="Folder for masks, overlays and results.json.")],
    support: Annotated[
        Path | None, typer.Option(help="Annotated photos: a COCO instances file, or a folder of labelme JSON.")
    ] = None,
    checkpoint: CheckpointOption = "demo",
    prototypes: Annotated[
        list[Path] | None, typer.Option(help="Classes saved before, beside or instead of --support; may be repeated.")
    ] = None,
    save_prototypes: Annotated[
        Path | None, typer.Option(help="Save the classes here, for later without their photos.")
    ] = None,
    classes: Annotated[str | None, typer.Option(help="Of --support only these, such as cat,dog.")] = None,
    support_images: Annotated[
        Path | None, typer.Option(help="Folder of the supports' photos; default: where the file says, near it.")
    ] = None,
    support_selection: Annotated[
        Literal["random", "nearest"], typer.Option(help="nearest: for each photo the supports most like it.")
    ] = "random",
    shots: Annotated[int | None, typer.Option(min=1, help="Supports of each class; default: all.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random selection.")] = 0,
    weights: WeightsOption = None,
    backbone: OwnBackboneOption = None,
    image_size: OwnSizeOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Segment photos by a few annotated ones. Killed and started again, it goes on where it was."""
    with mistakes(goes_on=True):
        from la.predictor.checkpoint import DEMO
        from pipelines.config import PredictConfig
        from pipelines.predict.segment_folder import predict as run

        config = PredictConfig(
            checkpoint=checkpoint,
            support=support,
            prototypes=prototypes or (),
            images=images,
            out=out,
            classes=tuple(name.strip() for name in classes.split(",")) if classes else (),
            support_images=support_images,
            support_selection=support_selection,
            shots=shots,
            seed=seed,
            save_prototypes=save_prototypes,
            weights=weights,
            backbone=backbone,
            image_size=image_size,
            device=device,
            threads=threads,
        )
        with progress_bar("rate") as bar:
            task = bar.add_task("predict", total=None, rate="loading the model")

            def progress(done: int, total: int, rate: float) -> None:
                bar.update(task, completed=done, total=total, rate=f"{rate:.1f} photos/s")

            report = run(config, progress)
        if checkpoint == DEMO:
            console.print("note: the demo model knows drawn scenes; for photos pass --checkpoint, a run of your own")
        rate = f" at {report.photos_per_second:.2f} photos/s" if report.made else ""
        console.print(f"{report.made} photos segmented{rate}, {report.already} there already: {report.results.parent}")
        if report.skipped:
            console.print(f"note: {len(report.skipped)} photos could not be used and were left out")
            for name, reason in report.skipped.items():
                console.print(f"  skipped {name}: {reason}", highlight=False, markup=False)


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="File to write: .onnx, or .pt2 by torch.export.")],
    checkpoint: CheckpointOption = "demo",
    ways: Annotated[int | None, typer.Option(min=1, help="Number of classes; default: those of --prototypes.")] = None,
    shots: Annotated[int, typer.Option(min=1, help="Supports of each class, which a hybrid's file fixes.")] = 1,
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
        console.print(f"{report.heads}{f' and {report.classes}' if report.classes else ''}", highlight=False)
        if report.difference is not None:
            console.print(f"differs from the model by at most {report.difference:.1e} on a random input")
