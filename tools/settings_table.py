"""docs/settings.md from the typed settings: `python -m tools.settings_table` writes it anew."""

from pathlib import Path
from typing import Literal, get_args, get_origin

import annotated_types
from pydantic_core import PydanticUndefined

from pipelines.config import (
    RECIPES,
    EvaluateConfig,
    FeaturizeConfig,
    PredictConfig,
    ServeConfig,
    Settings,
    SweepConfig,
    TrainConfig,
    fields_of,
    panel_of,
    plain_type,
)
from pipelines.experiment_file import as_text, flag_of

FILE = Path(__file__).parents[1] / "docs" / "settings.md"
SIGNS = (
    (annotated_types.Ge, "ge", "≥"),
    (annotated_types.Gt, "gt", ">"),
    (annotated_types.Le, "le", "≤"),
    (annotated_types.Lt, "lt", "<"),
)
SECTIONS = {
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "featurize": FeaturizeConfig,
    "sweep": SweepConfig,
    "predict": PredictConfig,
    "serve": ServeConfig,
}


def table(settings: type[Settings]) -> str:
    """Markdown rows: name, default, range, what it does."""
    lines = ["| name | default | values | |", "|---|---|---|---|"]
    for panel in dict.fromkeys(panel_of(settings, name) for name in fields_of(settings)):
        lines.append(f"| **{panel}** | | | |")
        for name in (each for each in fields_of(settings) if panel_of(settings, each) == panel):
            field = settings.model_fields[name]
            default = "" if field.default in (None, (), PydanticUndefined) else f"`{as_text(field.default)}`"
            recipes = [f"{recipe} `{as_text(own[name])}`" for recipe, own in RECIPES.items() if name in own]
            default += f"; {', '.join(recipes)}" if recipes and settings is TrainConfig else ""
            bounds = [
                f"{sign} {getattr(b, key):g}"
                for b in field.metadata
                for kind, key, sign in SIGNS
                if isinstance(b, kind)
            ]
            if get_origin(plain := plain_type(field.annotation)) is Literal:
                bounds = [f"`{value}`" for value in get_args(plain)]
            own_flag = "" if flag_of(settings, name)[2:].replace("-", "_") == name else f" ({flag_of(settings, name)})"
            lines.append(f"| `{name}`{own_flag} | {default} | {', '.join(bounds)} | {field.description} |")
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    head = (
        "# Settings\n\nMade from `pipelines/config.py` by `python -m tools.settings_table`. A setting is an option,\n"
        "`--val-every` for `val_every`, and a line of an experiment file; of training also `--set val_every=100`,\n"
        "and a line of a study. After a semicolon: what a recipe sets where nothing else is given.\n"
    )
    parts = [
        f"## {verb}\n\n{settings.__doc__.strip().splitlines()[0]}\n\n{table(settings)}\n"
        for verb, settings in SECTIONS.items()
    ]
    return "\n".join([head, *parts])


if __name__ == "__main__":
    FILE.write_text(page())
    print(FILE)
