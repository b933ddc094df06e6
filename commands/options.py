"""From typed settings to the options of a verb, from experiment files to settings; and how mistakes are told."""

import inspect
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args

import annotated_types
import typer
from pydantic import ValidationError
from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from la.errors import Diverged, InputError
from pipelines.config import RECIPES, Settings, TrainConfig, closest, entry_type, fields_of, panel_of, plain_type
from pipelines.experiment_file import as_file, as_text, assignment, flag_of, read_settings
from pipelines.remote_path import RemotePath, path_or_uri
from pipelines.training.stop import Stopped

console = Console()


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
        rich_help_panel="Where",
        help="Ray cluster: auto, host:port, ray://host:10001, or local for a Ray of this job's own (the default; "
        "RAY_ADDRESS says it as well).",
    ),
]
TRAINING_OPTIONS = {
    "again": (bool, typer.Option("--again", help="Train anew what code from before has trained; the old is kept.")),
    "keep": (bool, typer.Option("--keep", help="Take what code from before has trained as it is.")),
    "register": (
        str | None,
        typer.Option(
            "--register", metavar="NAME", help="Put the best model into MLflow's model registry by this name."
        ),
    ),
}
FILE_OPTIONS = {
    "config_file": (
        Path | None,
        typer.Option(
            "--config", metavar="FILE", help="Settings in TOML, as --print-config prints; options win over it."
        ),
    ),
    "assigned": (
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any setting by its name, in a sweep any of training; may be given repeatedly.",
        ),
    ),
    "print_config": (bool, typer.Option("--print-config", help="Print all settings as a file for --config, and end.")),
}


def verb(
    app: typer.Typer,
    settings: type[Settings],
    *,
    name: str | None = None,
    about: str | None = None,
    without: Collection[str] = (),
    defaults: Mapping[str, Any] | Callable[..., Mapping[str, Any]] | None = None,
    training: Collection[str] = (),
    from_file: bool = False,
    trains: bool = False,
    goes_on: bool = False,
) -> Callable:
    """Register a function as a verb; its options are the fields of `settings`, then its own parameters.

    It is called with the settings that were given and its own options. `without`: fields that are no options;
    `defaults`: for this verb, where they differ from the settings' own, or what gives them, called with the verb's own
    options; `training`: fields of TrainConfig that are options too, for the settings' field `train`; `from_file`: with
    --config, --set and --print-config; `trains`: with --again, --keep and --register, which it gets as `how`;
    `goes_on`: once stopped, the same command goes on.
    """
    known = defaults if isinstance(defaults, Mapping) else {}

    def register(body: Callable) -> Callable:
        own = [p for p in inspect.signature(body, eval_str=True).parameters.values() if p.name not in ("config", "how")]
        hidden = callable(defaults)  # they are said elsewhere, in a file
        options = [
            option(settings, field, known.get(field), hidden) for field in fields_of(settings) if field not in without
        ]
        options += [option(TrainConfig, field) for field in training]
        if trains:
            options += [_parameter(field, *how) for field, how in TRAINING_OPTIONS.items()]
        if from_file:
            options += [_parameter(field, *how) for field, how in FILE_OPTIONS.items()]

        def run(**given: Any) -> None:
            with mistakes(goes_on):
                mine = {each.name: given.pop(each.name) for each in own}
                if trains:
                    code = other_code(given.pop("again"), given.pop("keep"))
                    mine["how"] = {"code": code, "register": given.pop("register")}
                printing = given.pop("print_config", False)
                base = defaults(**mine) if callable(defaults) else known
                config = _assemble(settings, dict(base), given, training)
                if printing:
                    say(as_file(config))
                else:
                    body(config, **mine)

        parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*options, *own)]
        run.__signature__ = inspect.Signature(parameters)
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        app.command(name or body.__name__.replace("_", "-"), help=about or inspect.getdoc(body))(run)
        return body

    return register


def option(settings: type[Settings], name: str, default: Any = None, hidden: bool = False) -> inspect.Parameter:
    """The option of a field; None where it is not given, so that a file, a recipe or a protocol may decide."""
    field, plain = settings.model_fields[name], plain_type(settings.model_fields[name].annotation)
    default = field.default if default is None else default
    about, flag = field.description, flag_of(settings, name)
    if default not in (None, (), PydanticUndefined) and not hidden:
        named = RECIPES.items() if settings is TrainConfig else ()
        recipes = ", ".join(f"{recipe} {as_text(own[name])}" for recipe, own in named if name in own)
        about += f" (default: {as_text(default)}{'; recipe ' * bool(recipes)}{recipes})"
    how: dict[str, Any] = {"envvar": (field.json_schema_extra or {}).get("envvar")}
    if plain is bool:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    elif entry_type(plain) is Path:
        plain = list[Path]
    elif plain in (int, float):
        bounds = {type(bound): bound for bound in field.metadata}
        how["min"] = getattr(bounds.get(annotated_types.Ge), "ge", None)
        how["max"] = getattr(bounds.get(annotated_types.Le), "le", None)
    elif RemotePath in get_args(plain):
        plain, how = Path, how | {"parser": path_or_uri, "metavar": "DIR"}
    elif entry_type(plain):
        plain, how = str, how | {"metavar": "A,B,..."}
    how |= {"help": about, "rich_help_panel": panel_of(settings, name), "show_default": False}
    return _parameter(name, plain, typer.Option(flag, **how), field.is_required())


def _parameter(name: str, kind: Any, how: Any, required: bool = False) -> inspect.Parameter:
    default = inspect.Parameter.empty if required else None
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind if required else kind | None, how],
    )


def _assemble(settings: type[Settings], defaults: dict, given: dict, training: Collection[str]) -> Settings:
    """The settings of a verb: what is given by options wins over --set, that over the file, that over `defaults`."""
    file, assigned = given.pop("config_file", None), given.pop("assigned", None) or []
    values = defaults | (read_settings(file) if file else {})
    named = {name: value for name, value in given.items() if value is not None and value != []}
    nested = {name: named.pop(name) for name in training if name in named}
    assignments = dict(assignment(each, TrainConfig if training else settings) for each in assigned)
    if training:
        train = values.get("train", {})
        if not isinstance(train, dict):
            raise InputError(f"train is {train!r} in {file}; expected a table of settings of training.")
        return settings(**(values | named | {"train": train | assignments | nested}))
    return settings(**(values | assignments | named))


@contextmanager
def mistakes(goes_on: bool = False) -> Iterator[None]:
    """The user's mistakes are one message and exit code 2, a training that diverged 1; Ctrl-C is 130.

    `goes_on`: whether the same command goes on where it was, which Ctrl-C is answered with.
    """
    # warnings are notes to the user, without the line of code they come from
    warnings.showwarning = lambda message, *_, **__: Console(stderr=True).print(
        "note:", message, style="yellow", markup=False
    )
    try:
        yield
    except (InputError, ValidationError) as error:
        message = str(error) if isinstance(error, InputError) else wrong_setting(error)
        Console(stderr=True).print("error:", message, style="red", highlight=False, soft_wrap=True, markup=False)
        raise typer.Exit(1 if isinstance(error, Diverged) else 2) from error
    except Stopped as stopped:
        Console(stderr=True).print(stopped, style="yellow", highlight=False, soft_wrap=True, markup=False)
        raise typer.Exit(stopped.exit_code) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command goes on where it was" if goes_on else "stopped")
        raise typer.Exit(130) from None


def wrong_setting(error: ValidationError) -> str:
    """A setting that its model refuses, by its option."""
    first = error.errors()[0]
    kind = next((kind for kind in _all_settings(Settings) if kind.__name__ == error.title), Settings)
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return f"{name} is not a setting of {kind.__name__}. Nearest: {closest(name, kind)}."
    if not name:  # of several settings together
        return first["msg"].removeprefix("Value error, ")
    return f"{flag_of(kind, name)} is {first['input']!r}: {first['msg']}."


def _all_settings(kind: type[Settings]) -> Iterator[type[Settings]]:
    for each in kind.__subclasses__():
        yield each
        yield from _all_settings(each)


def other_code(again: bool | None, keep: bool | None) -> str:
    """What becomes of results that other code made: ask, again or keep. InputError where both are asked for."""
    if again and keep:
        raise InputError("--again and --keep exclude each other: train anew, or take what is there.")
    return "again" if again else "keep" if keep else "ask"


def progress_bar(*fields: str) -> Progress:
    """A bar with the count, the task fields named, and the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns, *(TextColumn("{task.fields[" + f + "]}") for f in fields), TimeRemainingColumn(), console=console
    )


def say(*lines: str) -> None:
    """Print lines as they are, however long."""
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
