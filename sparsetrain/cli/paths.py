"""Verbs that take paths and options instead of settings: their arguments and what they do."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from sparsetrain.errors import UserError, nearest
from sparsetrain.files import typed_path


def report_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``report``."""
    about = "a run or a pipeline; or several paths, a directory of runs, or results.csv, to compare arms"
    parser.add_argument("places", nargs="+", metavar="PATH", help=about)
    parser.add_argument("--out", metavar="DIR", help="compare arms; write results.csv, bars.md and figure.png here")
    parser.add_argument("--base", metavar="ARM", help="compare arms; with this one, not with those nearest to each")


def report(given: Namespace) -> None:
    """Show the results of a run, or compare arms."""
    from rich.console import Console

    from sparsetrain.report.show import show_run
    from sparsetrain.stages.arms import show_arms, shows_arms

    places = [typed_path(place, "PATH") for place in given.places]
    out = None if given.out is None else typed_path(given.out, "--out")
    if len(places) > 1 or out is not None or given.base is not None or shows_arms(places[0]):
        show_arms(places, out, Console(), given.base)
    else:
        show_run(places[0], Console())


def sweep_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``sweep``."""
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="run directories, their parents, or results.csv")
    parser.add_argument("--x", default="lr", metavar="KEY", help="the swept setting: lr (default), model.init_std, ...")
    parser.add_argument("--out", metavar="DIR", help="write results.csv, optima.csv and figure.png here")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds to ask for at a minimum (default 3)")
    parser.add_argument("--search", action="store_true", help="a random search: rank the points, fit no curves")


def sweep(given: Namespace) -> None:
    """Read the runs of a sweep and show where its optimum lies."""
    from rich.console import Console

    from sparsetrain.studies.sweep import show_sweep

    if given.seeds < 1:
        raise UserError(f"--seeds={given.seeds} must be at least 1")
    places = [typed_path(place, "RUNS") for place in given.runs]
    out = None if given.out is None else typed_path(given.out, "--out")
    show_sweep(places, given.x, out, given.seeds, given.search, Console())


def fit_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``fit``."""
    about = (
        "run directories, their parents, or results.csv; law=tau, batch, critical, loss or noise; out=DIR for law.yaml "
    )
    about += "and law.png; per=weight or nonzero, the parameters that count; target=LOSS, for law=critical"
    parser.usage = "sparsetrain fit RUNS ... law=LAW [out=DIR] [per=weight] [target=LOSS]"
    parser.add_argument("words", nargs="+", metavar="RUNS law=LAW", help=about)


def fit(given: Namespace) -> None:
    """Fit a law to the runs of a sweep."""
    from rich.console import Console

    from sparsetrain.studies.fit import FitRequest, fit_sweep

    places, settings = _divided("fit", given.words, ("law", "out", "per", "target"), "RUNS")
    if "law" not in settings or not places:
        raise UserError(f"fit needs {'a sweep' if places == [] else 'a law'}: sparsetrain fit RUNS law=tau")
    out, target = settings.get("out"), settings.get("target")
    try:
        loss = None if target is None else float(target)
    except ValueError:
        raise UserError(f"target={target} must be a number") from None
    place = None if out is None else typed_path(out, "out")
    fit_sweep(FitRequest(places, settings["law"], place, settings.get("per", "weight"), loss), Console())


def _divided(verb: str, words: Sequence[str], known: Sequence[str], path: str) -> tuple[list[Path], dict[str, str]]:
    """Return the paths among the words of a verb, and its settings, which are written ``name=value``."""
    places: list[Path] = []
    settings: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in known:
            place = typed_path(word, path)
            if equals and not place.exists():
                raise UserError(f"{verb} has no setting '{name}'{nearest(name, known)}")
            places.append(place)
        elif name in settings:
            raise UserError(f"{verb}: {name} is given twice")
        else:
            settings[name] = value
    return places, settings


def mask_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``mask``."""
    inspect = parser.add_subparsers(metavar="inspect").add_parser(
        "inspect", add_help=False, usage="sparsetrain mask inspect PATH [picture=FILE]"
    )
    inspect.add_argument(
        "arguments",
        nargs="*",
        metavar="PATH [picture=FILE]",
        help="a run, a checkpoint or a file of masks (.npz, .safetensors); FILE is where to draw the picture",
    )


def mask(given: Namespace) -> None:
    """Inspect masks."""
    from rich.console import Console

    from sparsetrain.report.masks import inspect_masks

    pictures = [word.partition("=")[2] for word in given.arguments if word.startswith("picture=")]
    paths = [word for word in given.arguments if not word.startswith("picture=")]
    if len(paths) != 1 or len(pictures) > 1 or "" in pictures:
        raise UserError("mask inspect takes one path and at most one picture=FILE")
    picture = typed_path(pictures[0], "picture") if pictures else None
    inspect_masks(typed_path(paths[0], "PATH"), Console(), picture)


def quantize_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``quantize``."""
    parser.usage = "sparsetrain quantize RUN_DIR out=DIR [bits=4] [group=64]"
    about = "a run; out=DIR, a new directory; bits=4 or 8; group=N, the weights that share a scale and an offset"
    parser.add_argument("words", nargs="+", metavar="RUN_DIR out=DIR", help=about)


def quantize(given: Namespace) -> None:
    """Write the model of a run in 4 or 8 bits."""
    from rich.console import Console

    from sparsetrain.stages.quantize import quantize_run

    runs, settings = _divided("quantize", given.words, ("out", "bits", "group"), "RUN_DIR")
    if len(runs) != 1 or "out" not in settings:
        raise UserError("quantize takes one run and a new directory: sparsetrain quantize RUN_DIR out=DIR")
    numbers = {}
    for name, default in (("bits", "4"), ("group", "64")):
        if not settings.get(name, default).isdecimal():
            raise UserError(f"{name}={settings[name]} must be a whole number")
        numbers[name] = int(settings.get(name, default))
    place = typed_path(settings["out"], "out")
    quantize_run(runs[0], place, numbers["bits"], numbers["group"], Console())
