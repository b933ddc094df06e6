"""What a study is: a TOML file of variants, what they are trained with and evaluated on, and the tables to draw.

Files that come with the product lie in `sweeps/studies/`. A Python file with a function `study()` that returns the same
as a dictionary is taken as well. See docs/studies.md.
"""

import itertools
import re
import runpy
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from la.errors import InputError
from pipelines.config import (
    RECIPES,
    Count,
    Prompt,
    SearchConfig,
    Settings,
    SettingSpace,
    SweepConfig,
    TrainConfig,
    closest,
)

Task = tuple[int, int]  # ways, shots
Paper = Mapping[Task, float | tuple[float, ...]]  # mIoU in percent; a tuple has one number a fold
FOLDER = Path(__file__).parent / "studies"
BUILT_IN = ("ablations", "prompts", "nway", "folds", "generalist")  # files in it
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,=+-]*")
NOT_IN_NAME = r"[^A-Za-z0-9_.,=+-]"
SET_BY_SWEEP = {"workspace", "name", "store", "fold", "fold_lists", "seed", "device", "threads"}


def task_title(ways: int, shots: int) -> str:
    """Such as "5-way 1-shot"."""
    return f"{ways}-way {shots}-shot"


def paper_numbers(table: Mapping) -> dict:
    """{"1-way 5-shot": 41.2}, or {"1,5": 41.2}, as {(1, 5): 41.2}."""
    return {tuple(map(int, re.findall(r"\d+", key))) if isinstance(key, str) else key: v for key, v in table.items()}


class Variant(Settings):
    """One row of a study: a name for files and commands, a title for tables, what differs from the base."""

    name: str
    title: str
    method: str = "la"  # or the name of a baseline, which is evaluated without training
    settings: dict[str, Any] = Field({})  # of TrainConfig: what makes the variant, and nothing overrides
    defaults: dict[str, Any] = Field({})  # of TrainConfig: what suits it, where nothing else is given
    paper: dict[Task, float | tuple[float, ...]] = Field({})  # the paper's mIoU in percent, masks as prompts

    @field_validator("paper", mode="before")
    @classmethod
    def _tasks(cls, value: dict) -> dict:
        return paper_numbers(value)

    @classmethod
    def read(cls, name: str, table: dict) -> "Variant":
        """A variant from its table in a study's file, where its settings stand beside title, method and paper."""
        own = {key: value for key, value in table.items() if key in cls.model_fields and key != "settings"}
        settings = {key: value for key, value in table.items() if key not in own}
        return cls(**{"title": name} | own, name=name, settings=settings)

    @property
    def trained(self) -> bool:
        return self.method == "la"


class TableLayout(Settings):
    """A table of a study: `tasks` has a column a task, `folds` a column a fold, `prompts` a row a kind of prompt."""

    name: str  # of its files
    kind: Literal["tasks", "folds", "prompts"] = "tasks"
    title: str = ""
    note: str = ""
    variants: tuple[str, ...] | None = None  # its rows; None: all of the study
    by_prompt: dict[str, dict[Task, float]] = Field({})  # the paper's numbers of `prompts`

    @field_validator("by_prompt", mode="before")
    @classmethod
    def _tasks(cls, value: dict) -> dict:
        return {prompt: paper_numbers(numbers) for prompt, numbers in value.items()}


class Study(Settings):
    """Variants and grids of them, with what they share. Options of the command line win over `train` and the rest."""

    name: str
    about: str = ""  # for --help
    train: dict[str, Any] = Field({})  # settings of training for every variant
    variants: tuple[Variant, ...] = ()
    grid: dict[str, list] = Field({})  # setting of training -> values; every trained variant is crossed with every cell
    space: dict[str, SettingSpace] = Field({})  # setting of training -> what a search may give it
    search: dict[str, Any] = Field({})  # of SearchConfig: trials, hours, sampler, early_stopping, val_episodes
    baseline: str | None = None  # the variant that others are compared with, on the same episodes
    train_seeds: tuple[int, ...] = Field((0,), min_length=1)
    folds: tuple[int, ...] = Field((0,), min_length=1)
    ways: tuple[Count, ...] = Field((1, 2), min_length=1)
    shots: tuple[Count, ...] = Field((1,), min_length=1)
    prompts: tuple[Prompt, ...] = Field(("mask",), min_length=1)
    protocol: str = "la"
    seeds: int | None = None  # of test episodes; None: the protocol's
    episodes: int | None = None
    tables: tuple[TableLayout, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> "Study":
        for name in (self.name, *(table.name for table in self.tables)):
            if name != Path(name).name:
                raise ValueError(f"name {name!r} cannot be that of a file: it has a folder in it")
        for where, settings in (
            ("train", self.train),
            ("grid", self.grid),
            ("space", self.space),
            *((v.name, v.settings) for v in self.variants),
        ):
            for setting in settings:
                if setting not in TrainConfig.model_fields or setting in SET_BY_SWEEP:
                    raise ValueError(
                        f"{where}: {setting!r} is not a setting of training. Nearest: {closest(setting, TrainConfig)}"
                    )
        variants = self.all_variants()
        names = [variant.name for variant in variants]
        for name in names:
            if not NAME.fullmatch(name):
                raise ValueError(f"variant {name!r} cannot be the name of a file: letters, digits and _.,=+- are")
            if names.count(name) > 1:
                raise ValueError(f"two variants are {name!r}: a value stands twice in the grid")
        if self.space and (names or len(self.folds) > 1 or len(self.train_seeds) > 1):
            raise ValueError("a study with a [space] is a search: of one fold and one seed, without variants and grid")
        if not self.space and not names:
            raise ValueError("it has no variants: expected tables [variants.NAME], or a [grid] of values")
        if self.baseline and not self.baseline_of(variants):
            raise ValueError(f"baseline {self.baseline!r} is not among the variants {', '.join(names)}")
        for table in self.tables:
            if unknown := set(table.variants or ()) - set(names):
                raise ValueError(f"table {table.name!r}: {', '.join(sorted(unknown))} is not among the variants")
        return self

    def all_variants(self) -> tuple[Variant, ...]:
        """The variants crossed with the grid."""
        if not self.grid:
            return self.variants
        crossed = []
        for variant in self.variants or (Variant(name="base", title=""),):
            if not variant.trained:
                crossed.append(variant)
            for cell in self._cells() if variant.trained else ():
                name = "-".join([variant.name] * bool(self.variants) + [_cell_name(cell)])
                parts = [f"{setting}={_spelled(value)}" for setting, value in cell.items()]
                title = ", ".join([variant.title, *parts] if variant.title else parts)
                changes = {"name": name, "title": title, "settings": variant.settings | cell}
                crossed.append(variant.model_copy(update=changes))
        return tuple(crossed)

    def evaluation(self) -> dict[str, Any]:
        """What it says of folds, seeds and tasks, by the names of SweepConfig."""
        names = ("folds", "train_seeds", "ways", "shots", "prompts", "protocol", "seeds", "episodes")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def baseline_of(self, variants: tuple[Variant, ...]) -> Variant | None:
        """The variant that the others are compared with, or its first cell of the grid."""
        names = {self.baseline, *(f"{self.baseline}-{cell}" for cell in map(_cell_name, self._cells()))}
        return next((variant for variant in variants if variant.name in names), None)

    def _cells(self) -> list[dict[str, Any]]:
        """The combinations of the grid's values, each as its setting has it: "on" and true are one."""
        columns = [[getattr(TrainConfig(**{name: v}), name) for v in values] for name, values in self.grid.items()]
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*columns)]

    def settings_of(self, variant: Variant, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of training: the study's, the variant's defaults, what was given, what makes the variant.

        A recipe that was given wins over the defaults of what it sets.
        """
        by_recipe = RECIPES.get(given.get("recipe", ""), {})
        defaults = {name: value for name, value in variant.defaults.items() if name not in by_recipe}
        return self.train | defaults | dict(given) | variant.settings


def _cell_name(cell: Mapping[str, Any]) -> str:
    """Such as "lr=0.0001-loss=iou", of a cell of the grid; in place of what no file's name holds stands a +."""
    return "-".join(f"{name}={re.sub(NOT_IN_NAME, '+', _spelled(value))}" for name, value in cell.items())


def _spelled(value: object) -> str:
    if isinstance(value, list | tuple):
        return "+".join(map(_spelled, value))
    return ("on" if value else "off") if isinstance(value, bool) else str(value).removesuffix(".0")


def find_study(name: str) -> Study:
    """A study by its name, or from its file, .toml or .py. Raises InputError, which names what is wrong in it."""
    file = FOLDER / f"{name}.toml"
    file = file if file.is_file() else Path(name)
    if not file.is_file():
        raise InputError(f"study {name} is not there. Pass a .toml or .py file, or one of {', '.join(BUILT_IN)}.")
    try:
        content = runpy.run_path(str(file))["study"]() if file.suffix == ".py" else tomllib.loads(file.read_text())
        variants = tuple(Variant.read(key, table) for key, table in content.pop("variants", {}).items())
        if file.parent != FOLDER:  # those of the product, from which every start of the command line makes its verbs
            _check_methods(variants)
        return Study(**{"name": file.stem} | content, variants=variants)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise InputError(f"{file}: {where}: {first['msg'].removeprefix('Value error, ')}.") from error
    except Exception as error:  # a study in Python fails in any way
        raise InputError(
            f"{file} is not a study ({type(error).__name__}: {error}). See `sweep new` for one."
        ) from error


def _check_methods(variants: tuple[Variant, ...]) -> None:
    """ValueError for a method that is not there. Of a file alone: reports read sweeps that failed by one."""
    from la.evaluation.baselines import BASELINES  # it loads torch

    for variant in variants:
        if variant.trained == (variant.method in BASELINES):
            raise ValueError(f"variant {variant.name}: {variant.method!r} is none of la, {', '.join(BASELINES)}")


def search_of(study: Study) -> dict[str, Any]:
    """What a study says of its search, by the names of SearchConfig."""
    settings = dict(study.train)
    own = {"steps": settings.pop("steps")} if "steps" in settings else {}
    return own | {"space": study.space, "train": settings, "fold": study.folds[0], "study": study.name} | study.search


def search_of_sweep(config: SweepConfig, study: Study) -> SearchConfig:
    """The search of a study with a space, with what was given to `sweep run`. InputError for what a search has not."""
    if len(config.folds) + len(config.train_seeds) > 2 or config.variants:
        raise InputError(
            f"{study.name} has a [space], so it is a search: of one fold and one seed of training, without --variants."
        )
    names = set(SearchConfig.model_fields) & config.model_fields_set - {"study", "train", "seeds"}
    given = search_of(study) | {name: getattr(config, name) for name in names}
    train = given["train"] | config.train
    steps = {"steps": train.pop("steps")} if "steps" in train else {}
    return SearchConfig(**given | steps | {"train": train, "fold": config.folds[0], "seed": config.train_seeds[0]})
