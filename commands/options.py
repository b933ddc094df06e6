"""What the verbs share: options, the console, and how mistakes are told."""

import os
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from la.errors import InputError
from pipelines.remote_path import path_or_uri
from pipelines.training.stop import Stopped

console = Console()

WORKSPACE = Path("workspace")
WorkspaceOption = Annotated[
    Path, typer.Option("--workspace", envvar="LA_WORKSPACE", help="Folder of everything a study makes.")
]
StoreOption = Annotated[str | None, typer.Option("--store", help="Key of the feature store, if there are several.")]


def _join(address: str | None) -> str | None:
    """Every part that starts Ray reads RAY_ADDRESS, in worker processes as well."""
    if address:
        os.environ["RAY_ADDRESS"] = address
    return address


AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        callback=_join,
        help="Ray cluster: auto, host:port, ray://host:10001, or local for a Ray of this job's own (the default; "
        "RAY_ADDRESS says it as well).",
    ),
]
FoldOption = Annotated[int, typer.Option("--fold", help="COCO-20i fold, 0 to 3; its 20 classes stay unseen.")]
FoldsOption = Annotated[str, typer.Option("--folds", help="COCO-20i folds, such as 0 or 0,1,2,3.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:1; auto takes CUDA if there.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Torch threads of each process.")]
RepeatsOption = Annotated[int, typer.Option("--repeats", min=1, help="Pairs of passes; the median counts.")]
AlsoOption = Annotated[
    list[Path] | None,
    typer.Option(help="Workspace of another folder, featurized alike, to train on as well; may be given repeatedly."),
]
WaysOption = Annotated[int, typer.Option("--ways", min=1, help="Classes of an episode.")]
ShotsOption = Annotated[int, typer.Option("--shots", min=1, help="Support images of each class.")]
SeedsOption = Annotated[int, typer.Option("--seeds", min=1, help="Sets of episodes; mean and std are over them.")]
EpisodesOption = Annotated[int, typer.Option("--episodes", min=1, help="Episodes of each seed.")]
PhotosOption = Annotated[
    Path | None,
    typer.Option(
        "--coco-dir", parser=path_or_uri, metavar="DIR", help="Where the photos are: a folder, or the URI of one."
    ),
]
CocoOption = Annotated[
    Path,
    typer.Option(
        "--coco-dir", parser=path_or_uri, metavar="DIR", help="Folder or URI with annotations/, train2017/, val2017/."
    ),
]
BackboneOption = Annotated[str, typer.Option("--backbone", help="Any ViT of timm.")]
WeightsOption = Annotated[
    Path | None, typer.Option("--weights", help="Local weights in timm's names; default: timm's hub.")
]
SizeOption = Annotated[int, typer.Option("--image-size", help="Side in pixels that photos are resized to.")]
BatchScaleOption = Annotated[
    float,
    typer.Option("--batch-scale", min=0.01, help="Times B in the recipe's (B, N, K); 0.5 halves memory and time."),
]
RecipeOption = Annotated[
    Literal["small", "paper", "official", "hybrid"] | None,
    typer.Option(
        help="Training settings that belong together: for a few hundred photos (the default; of the hybrid preset, its "
        "own), the paper's, the released."
    ),
]
LrOption = Annotated[float | None, typer.Option(help="Learning rate after warm-up; default: the recipe's.")]
PromptOption = Annotated[
    Literal["mask", "point", "box", "point_box", "mixed"],
    typer.Option(help="Prompts on the supports; mixed: each instance a mask, points or a box."),
]
ProtocolOption = Annotated[
    Literal["la", "hsnet", "pfenet", "panet", "large"],
    typer.Option(help="How episodes are drawn and scored; numbers compare within one."),
]
ProtocolSeedsOption = Annotated[
    int | None, typer.Option("--seeds", min=1, help="Sets of episodes; default: the protocol's.")
]
ProtocolEpisodesOption = Annotated[
    int | None, typer.Option("--episodes", min=1, help="Of each seed; default: the protocol's.")
]
SupportsOption = Annotated[
    Literal["fixed", "varied"],
    typer.Option(help="K shots of every class, or 1 to K, where a photo of several classes counts for each."),
]


@contextmanager
def mistakes(goes_on: bool = False):
    """The user's mistakes are one message and exit code 2; Ctrl-C is 130, and says whether the command `goes_on`."""
    try:
        yield
    except (InputError, ValidationError) as error:
        told = str(error) if isinstance(error, InputError) else wrong_setting(error)
        Console(stderr=True).print("error:", told, style="red", highlight=False, soft_wrap=True, markup=False)
        raise typer.Exit(2) from error
    except Stopped as stopped:
        Console(stderr=True).print(stopped, style="yellow", highlight=False, soft_wrap=True, markup=False)
        raise typer.Exit(stopped.exit_code) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command goes on where it was" if goes_on else "stopped")
        raise typer.Exit(130) from None


def wrong_setting(error: ValidationError) -> str:
    """A setting that its model refuses, by the flag's name."""
    first = error.errors()[0]
    flag = "--" + str(first["loc"][0]).replace("_", "-") if first["loc"] else "settings"
    return f"{flag} is {first['input']!r}: {first['msg']}."


def progress_bar(*fields: str) -> Progress:
    """A bar with the count, the task fields named, and the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns, *(TextColumn("{task.fields[" + f + "]}") for f in fields), TimeRemainingColumn(), console=console
    )


def commas(values) -> str:
    """(1, 2) as "1,2"."""
    return ",".join(map(str, values))


def of_recipe(recipe: str, scale: float, **given) -> dict:
    """Fields of TrainConfig: the recipe, its batches times `scale`, and what is given in its path_or_uri."""
    from pipelines.config import scaled_batches

    return {"recipe": recipe, "batches": scaled_batches(recipe, scale)} | {
        name: value for name, value in given.items() if value is not None
    }


def numbers(text: str, flag: str) -> list[int]:
    """ "0,1,3" as integers; raises InputError naming the flag."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{flag} is {text!r}; expected whole numbers such as 0,1,2.") from error
