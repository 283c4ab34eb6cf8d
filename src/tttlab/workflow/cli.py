"""The command ``ttt-lab``: ask a trained model about images, and look at what the pipeline left."""

import argparse
import json
import sys
import webbrowser
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tttlab.errors import INTERRUPTED, UserError, one_line, pipeline_extra
from tttlab.runtime.compiler import postpone_compiler
from tttlab.workflow import places
from tttlab.workflow.environment import set_variables

EPILOG = """examples:
  ttt-lab check --network my.safetensors --backbone resnet50 --labeled summer/ --test winter/
                                                 does adapting help your own network?
  ttt-lab predict photo.png                      by the run that tuning recommends
  ttt-lab predict *.png --run actmad --json      by a run of your choice, for programs
  ttt-lab serve                                  answer requests over HTTP
  ttt-lab methods                                what there is to run
"""


def main(words: Sequence[str] | None = None) -> None:
    """Do what the command line says; a mistake ends in one line."""
    set_variables()
    parser = argparse.ArgumentParser(
        prog="ttt-lab",
        description=__doc__.partition(": ")[2],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ttt-lab {version('ttt-lab')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    predict = commands.add_parser("predict", help="classify images without and with adaptation")
    predict.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    predict.add_argument("--model", help="a model of params.yaml (default: the first one)")
    predict.add_argument("--run", help="a run of params.yaml (default: the best one in tuning)")
    predict.add_argument("--params", type=Path, default=Path("params.yaml"), help="settings")
    predict.add_argument("--json", action="store_true", help="print JSON instead of a table")
    predict.set_defaults(do=_predict)
    _add_check(commands)
    commands.add_parser("methods", help="list the methods").set_defaults(do=_methods)
    report = commands.add_parser("report", help="say where the report is")
    report.add_argument("--open", action="store_true", help="open it in a browser")
    report.set_defaults(do=_report)
    ui = commands.add_parser("ui", help="open MLflow's pages on this machine")
    ui.add_argument("--port", type=int, default=5000, help="first port to try (default: 5000)")
    ui.set_defaults(do=_ui)
    demo = commands.add_parser("demo", help="look at one image in a browser, on this machine")
    demo.add_argument("--port", type=int, default=7860, help="first port to try (default: 7860)")
    demo.add_argument("--params", type=Path, default=Path("params.yaml"), help="settings")
    demo.set_defaults(do=_demo)
    _add_serve(commands)
    arguments = parser.parse_args(words)
    # Modules of one's own are found from here, as `python -m` finds them.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        with one_line(), pipeline_extra():
            arguments.do(arguments)
    except KeyboardInterrupt:
        print(INTERRUPTED if arguments.do is _check else "interrupted", file=sys.stderr)
        sys.exit(130)


def _add_check(commands: argparse._SubParsersAction) -> None:
    check = commands.add_parser("check", help="find out whether adapting helps your own network")
    option = check.add_argument
    option(
        "--network",
        metavar="FILE",
        help="the trained network: weights of a timm model with its classifier (.safetensors, or "
        "from torch.save), or the dotted path of a callable that returns a module, or timm, for "
        "the weights of timm's hub",
    )
    option("--backbone", help="the timm name of the weights' architecture")
    option("--labeled", type=Path, metavar="DIR", help="labeled images, a folder for each class")
    option("--test", type=Path, metavar="DIR", help="shifted images, in class folders or not")
    option("--classes", type=Path, metavar="FILE", help="class names, in the order of the logits")
    option("--image-size", type=int, metavar="PIXELS", help="of the network's input")
    for name, what in (("--mean", "subtracted from"), ("--std", "that divides")):
        text = f"{what} R, G and B in [0, 1] (default: timm's, if any)"
        option(name, type=float, nargs=3, metavar=("R", "G", "B"), help=text)
    option("--out", type=Path, metavar="DIR", help="for settings and results (default: ttt-check)")
    option("--flip", action="store_true", help="a mirrored image is still of its class")
    option("--quick", action="store_true", help="fewer images and settings")
    check.set_defaults(do=_check, out=Path("ttt-check"))


def _add_serve(commands: argparse._SubParsersAction) -> None:
    serve = commands.add_parser("serve", help="answer requests over HTTP on this machine")
    which = serve.add_mutually_exclusive_group()
    which.add_argument("--model", help="a registered model's champion (default: the first one)")
    which.add_argument("--uri", help="a model's address for MLflow, as models:/NAME@champion")
    which.add_argument("--folder", type=Path, help="a folder, as outputs/served/NAME")
    option = serve.add_argument
    option("--port", type=int, default=5001, help="first port to try (default: %(default)s)")
    option("--workers", type=int, default=1, help="processes (default: %(default)s)")
    option("--images", metavar="DIR", help="images in here may be asked for as file:<path>")
    option("--together", type=int, help="most images adapted to at once (default: 64)")
    option("--device", help="auto, cpu, cuda or cuda:<n>")
    option("--limit", action="append", default=[], metavar="NAME=NUMBER", help="change a limit")
    option("--no-record", action="store_true", help="keep no MLflow run of what is served")
    serve.set_defaults(do=_serve)


def _serve(arguments: argparse.Namespace) -> None:
    from tttlab.workflow.serving import configure, serve

    config = configure(
        arguments.limit, arguments.images, together=arguments.together, device=arguments.device
    )
    names = ("model", "uri", "folder", "port", "workers")
    options = {name: getattr(arguments, name) for name in names}
    serve(config, **options, record=not arguments.no_record)


def _check(arguments: argparse.Namespace) -> None:
    from tttlab.workflow.check_settings import request_of
    from tttlab.workflow.checking import check

    check(request_of(arguments), arguments.out)


def _predict(arguments: argparse.Namespace) -> None:
    from tttlab.config.params import read_params

    params = read_params(arguments.params, base=places.ROOT)
    postpone_compiler()
    from tttlab.workflow.asking import predict_images  # seconds of imports

    rows = predict_images(params, arguments.images, arguments.model, arguments.run)
    if arguments.json:
        print(json.dumps(rows, indent=2, allow_nan=False))
        return
    from tabulate import tabulate

    print(f"{rows[0]['model']}, run {rows[0]['run']}")
    print(tabulate([_shown(row) for row in rows], headers="keys"))


def _shown(row: dict[str, Any]) -> dict[str, str]:
    """Give the columns of the table for people."""
    gate = {None: "–", True: "open", False: "shut"}[row["gate"]]
    return {
        "image": row["file"],
        "without": f"{row['source_class']} ({_percent(row['source_confidence'])})",
        "with": f"{row['class']} ({_percent(row['confidence'])})",
        "distance": "–" if row["distance"] is None else f"{row['distance']:.1f}",
        "gate": "fell back" if row["fell_back"] else gate,
        "ms": f"{row['milliseconds']:.1f}",
    }


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{fraction:.0%}"


def _methods(_arguments: argparse.Namespace) -> None:
    from tabulate import tabulate

    from tttlab.methods.__main__ import rows

    print(tabulate(rows(), headers="keys"))


def _report(arguments: argparse.Namespace) -> None:
    page = (places.OUTPUTS / "report.html").resolve()
    if not page.is_file():
        raise UserError(f"{page}: expected the report, found no file; run `make repro` first")
    print(page)
    if arguments.open:
        webbrowser.open(page.as_uri())


def _ui(arguments: argparse.Namespace) -> None:
    from tttlab.workflow.ui import open_pages

    open_pages(arguments.port)


def _demo(arguments: argparse.Namespace) -> None:
    from tttlab.config.params import read_params

    params = read_params(arguments.params, base=places.ROOT)
    postpone_compiler()
    from tttlab.workflow.demo.page import open_demo  # seconds of imports

    open_demo(params, arguments.port)


if __name__ == "__main__":
    main()
