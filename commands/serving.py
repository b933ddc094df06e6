"""The web page and the HTTP API."""

from typing import Annotated

import typer

from commands.options import AddressOption, DeviceOption, ThreadsOption, WeightsOption, console, mistakes
from commands.prediction import CheckpointOption, OwnBackboneOption, OwnSizeOption

app = typer.Typer()


@app.command()
def serve(
    checkpoint: CheckpointOption = "demo",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all, for everybody on the network.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8080,
    weights: WeightsOption = None,
    backbone: OwnBackboneOption = None,
    image_size: OwnSizeOption = None,
    max_photo_mb: Annotated[int, typer.Option(min=1, help="Megabytes of one photo.")] = 10,
    max_photos: Annotated[int, typer.Option(min=1, help="Supports of a class set, and queries of a page.")] = 16,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Copies of the model, each a process on Ray; default: one, without Ray.")
    ] = None,
    address: AddressOption = None,
) -> None:
    """Open a web page, and beside it an HTTP API, to label a few photos and have others segmented."""
    with mistakes():
        from pipelines.config import ServeConfig
        from pipelines.serve.server import serve as run

        config = ServeConfig(
            checkpoint=checkpoint,
            host=host,
            port=port,
            weights=weights,
            backbone=backbone,
            image_size=image_size,
            max_photo_mb=max_photo_mb,
            max_photos=max_photos,
            device=device,
            threads=threads,
            replicas=replicas,
        )

        def ready(url: str) -> None:
            console.print(f"page: {url}  API: {url}/api/openapi.json  Ctrl-C ends it", highlight=False, soft_wrap=True)

        run(config, ready)
