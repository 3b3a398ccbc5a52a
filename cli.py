"""The command line: python -m diff2flow_nodes run workflow_api.json."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from .hosts import HostError, use
from .hosts.headless import HeadlessHost
from .hosts.headless.classes import INSTALL, NodeClasses
from .hosts.headless.execute import NodeFailure, execute
from .hosts.headless.graph import plan
from .hosts.headless.workflow import Workflow, WorkflowError, named, override, read_workflow
from .hosts.headless.written import announce
from .hosts.port import FOLDERS
from .training.launch import launched, launched_alone

if TYPE_CHECKING:
    from .training.parallel import Processes

_PACKAGES = ("torch", "diffusers", "transformers", "tokenizers", "open_clip", "safetensors", "tqdm", "PIL")

DONE, FAILED, WRONG, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143

_EPILOG = """exit codes:
  0    done
  1    a node failed while running
  2    the command, the workflow or one of its files is wrong; nothing has run if it was found before the first node
  130  interrupted by Ctrl-C (143: by SIGTERM); what nodes saved until then is kept

The path of every file written goes to stdout, one a line; progress and errors go to stderr.
"""


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as a scheduler sends it before it takes the machine away: treated like Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code."""
    options = build_parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.ERROR if _rank() else logging.INFO if options.verbose else logging.WARNING,
        format="%(levelname)s: %(message)s",
        stream=sys.stderr,
    )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from the files given
    try:
        return options.command(options)
    except _Terminated:
        return _complain(f"terminated{_possible_reason()}; what was saved until then is kept", TERMINATED)
    except KeyboardInterrupt:
        return _complain("interrupted; what was saved until then is kept", INTERRUPTED)


def build_parser() -> argparse.ArgumentParser:
    """The parser; `command` in its result is the function to call with the options."""
    parser = argparse.ArgumentParser(
        prog="python -m diff2flow_nodes",
        description="Diff2Flow nodes without ComfyUI: runs API-format workflows headless, and measures them.",
    )
    parser.add_argument("--version", action="version", version=f"diff2flow_nodes {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="run an API-format workflow",
        description="Runs a workflow that ComfyUI exported with 'Workflow > Export (API)'.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("workflow", type=Path, help="the API-format .json file")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NODE.INPUT=VALUE",
        help="changes an input; NODE is an id, a title, or a class that one node has; VALUE is JSON or else text;"
        " repeatable",
    )
    run.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NODE",
        help="runs this output node and what it needs, not all of them; named as in --set; repeatable",
    )
    _add_common(run)
    run.set_defaults(command=_run)
    nodes = commands.add_parser("nodes", help="list the node classes that workflows may use")
    _add_common(nodes)
    nodes.set_defaults(command=_nodes)
    _add_bench(commands)
    return parser


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure every claim and write the report, or compare two results",
        description="Measures every claim about this pack and writes bench/REPORT.md; what is done is not done again.",
        epilog="exit codes: 0 done; 1 a stage failed, or --compare found something worse; 2 the command is wrong",
    )
    bench.add_argument("--quick", action="store_true", help="a small part of it, on priors that are hardly trained")
    bench.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    bench.add_argument("--full", action="store_true", help="networks of full size; needs --device cuda")
    bench.add_argument("--models", type=Path, default=Path(".cache/models"), metavar="DIR",
                       help="holds the priors, or they are trained into it (.cache/models)")  # fmt: skip
    bench.add_argument("--out", type=Path, default=Path(".cache/bench"), metavar="DIR",
                       help="everything on the way; quick and partial reports, too (.cache/bench)")  # fmt: skip
    bench.add_argument("--workers", type=int, default=2, help="stages side by side (2)")
    bench.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="these stages, and what they need")
    bench.add_argument("--keep", action="store_true", help="keep results that other versions of the code have left")
    bench.add_argument("--compare", nargs=2, type=Path, metavar="JSON",
                       help="only name what got worse from the first evidence.json to the second")  # fmt: skip
    bench.add_argument("--report", nargs=2, type=Path, metavar=("JSON", "MARKDOWN"),
                       help="only compose the report of an evidence.json again; nothing is measured")  # fmt: skip
    bench.set_defaults(command=_bench, verbose=True)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        type=Path,
        default=Path("models"),
        metavar="DIR",
        help="holds checkpoints, loras and datasets (models)",
    )
    parser.add_argument("--input", type=Path, default=Path("input"), metavar="DIR", help="images to read (input)")
    parser.add_argument(
        "--output", type=Path, default=Path("output"), metavar="DIR", help="where images are saved (output)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps, … (cpu)")
    parser.add_argument("--verbose", action="store_true", help="tell of each node on stderr, and show tracebacks")


def _run(options: argparse.Namespace) -> int:
    host = _host(options)
    classes = NodeClasses(_own_nodes)
    try:
        workflow = read_workflow(options.workflow)
        changed = override(workflow, options.set)
        folders = {kind: str(host.directory(kind)) for kind in FOLDERS}
        order = plan(workflow, classes, folders, changed, named(workflow, options.only))
    except WorkflowError as error:
        return _complain("\n".join(error.problems), WRONG)
    return _execute(host, workflow, order, classes, options)


def _execute(
    host: HeadlessHost, workflow: Workflow, order: list[str], classes: NodeClasses, options: argparse.Namespace
) -> int:
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        _require_packages()
        _require_writable(host.folder("output"))
        processes = _joined(host)
        if processes.is_writer:
            announce(_print_path, options.models, options.output)
        execute(workflow, order, classes, processes)
    except NodeFailure as failure:
        return _failed(failure, options.verbose)
    except (ValueError, OSError) as error:
        return _complain(str(error), WRONG)
    finally:
        signal.signal(signal.SIGTERM, before)
    return DONE


def _joined(host: HeadlessHost) -> Processes:
    """The processes of this run; HostError before the first node, if there is no such device."""
    from .training.parallel import joined

    if launched_alone():
        logging.getLogger(__name__).warning(
            "accelerate was asked for several processes and started this one only, as it does without several GPUs;"
            " 'accelerate launch --multi_gpu --num_processes …' starts them, also on the CPU"
        )
    return joined(host.device)


def _possible_reason() -> str:
    """For SIGTERM: when one of several processes ends, the launcher sends it to the others, often before they know."""
    return ": another process of this run ended, or all were told to end" if launched() else ""


def _rank() -> int:
    """Number of this process among those that a launcher started; 0 writes."""
    return int(os.environ.get("RANK") or "0")


def _own_nodes() -> Mapping[str, type]:
    from .nodes import NODE_CLASS_MAPPINGS

    return NODE_CLASS_MAPPINGS


def _require_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise HostError(f"the Python packages {', '.join(missing)} are not installed; {INSTALL}")


def _require_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK):
        raise HostError(f"the output folder {folder} cannot be written to; give another one with --output")


def _nodes(options: argparse.Namespace) -> int:
    _host(options)
    print("\n".join(sorted(NodeClasses(_own_nodes))))
    return DONE


def _bench(options: argparse.Namespace) -> int:
    try:
        from .bench.evidence.command import bench
    except ModuleNotFoundError as error:
        if error.name and not error.name.startswith(f"{__package__}.bench"):
            raise
        return _complain(
            "the measurements do not come with ComfyUI's registry: run 'bench' in a git checkout of this pack", WRONG
        )
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return bench(options, _print_line)
    finally:
        signal.signal(signal.SIGTERM, before)


def _host(options: argparse.Namespace) -> HeadlessHost:
    host = HeadlessHost(options.models, options.input, options.output, options.device)
    use(host)
    return host


def _failed(failure: NodeFailure, verbose: bool) -> int:
    if verbose:
        logging.getLogger(__name__).info("traceback of the failure", exc_info=failure.cause)
    return _complain(str(failure), WRONG if isinstance(failure.cause, HostError) else FAILED)


def _complain(text: str, code: int) -> int:
    where = f" (process {_rank()})" if _rank() else ""
    for line in text.splitlines():
        print(f"error{where}: {line}", file=sys.stderr)
    return code


def _print_path(path: Path) -> None:
    print(path, flush=True)


def _print_line(line: str) -> None:
    print(line, flush=True)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def _version() -> str:
    from . import __version__

    return __version__
