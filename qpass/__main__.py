"""``python -m qpass``: look at saved programs from a shell or in continuous integration.

    python -m qpass diff a.pt2 b.pt2 [--html FILE] [--json] [--fail-if KIND=OPERATOR ...]
    python -m qpass report model.pt2 [--html FILE] [--json] [--strict]
    python -m qpass env

Exit codes: 0 all went well, and no condition of --fail-if holds; 1 a condition of --fail-if holds, or --strict found
something left undone; 2 the command line is wrong, or a file is not there or holds no program.

torch executes code while it opens a .pt2: open only files whose origin you trust.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qpass.errors import QpassError, StrictError

KINDS = ("added", "removed", "rewired", "retargeted")
FINE, FAILED, WRONG = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except StrictError as error:
        print(error, file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stderr.close()
        return FINE
    except (QpassError, OSError) as error:
        print(f"qpass: {error}", file=sys.stderr)
        return WRONG
    return code


def diff(options: argparse.Namespace) -> int:
    """Print what changed; 1 when a condition of ``--fail-if`` holds."""
    from qpass.inspect.changes.diff_data import is_op
    from qpass.inspect.diff import diff

    found = diff(options.a, options.b)
    if options.html:
        found.save_html(options.html)
    if options.json:
        print(found.to_json())
    else:
        found.show()
    holding = []
    for kind, pattern in options.fail_if:
        nodes = [change.node for change in found.changes if kind in (change.kind, "changed")]
        named = [view.path for view in nodes if is_op(view, pattern)]
        if named:
            more = ", ..." if len(named) > 5 else ""
            holding.append(f"{kind}={pattern} holds for {len(named)}: {', '.join(named[:5])}{more}")
    for line in holding:
        print(f"qpass: --fail-if {line}", file=sys.stderr)
    return FAILED if holding else FINE


def report(options: argparse.Namespace) -> int:
    """Print what is quantized and what is not, and why."""
    import json

    from qpass.inspect.render.page import page
    from qpass.inspect.render.report_html import html
    from qpass.inspect.report import report
    from qpass.io import load

    found = report(load(options.model), strict=options.strict)
    if options.html:
        Path(options.html).write_text(page("qpass report", html(found)), encoding="utf-8")
    print(json.dumps(found.to_dict(), indent=1, sort_keys=True) if options.json else found)
    return FINE


def env(options: argparse.Namespace) -> int:
    """Print what a report of a problem should say about the machine."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import qpass
    from qpass.targets import X86

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    missing = X86.missing()
    told = {
        "qpass": qpass.__version__, "torch": torch.__version__, "python": platform.python_version(),
        "system": platform.platform(), "cpu": torch.backends.cpu.get_cpu_capability(),
        "x86 kernels": f"none: {missing}" if missing else "int8", "threads": str(torch.get_num_threads()),
    }  # fmt: skip
    told |= {name: installed(name) for name in ("rich", "matplotlib", "fast-sugiyama", "networkx")}
    print("\n".join(f"{name:<14} {value}" for name, value in told.items()))
    return FINE


def condition(text: str) -> tuple[str, str]:
    """``"added=aten.*"`` -> ("added", "aten.*"); ``"changed"`` alone means any change at all."""
    kind, equals, pattern = text.partition("=")
    if kind == "changed" and not equals:
        return kind, "*"
    if kind not in (*KINDS, "changed") or not pattern:
        kinds = ", ".join(KINDS)
        raise argparse.ArgumentTypeError(f"{text!r} is no condition: write added=aten.*, with {kinds} or changed")
    return kind, pattern


def _parser() -> argparse.ArgumentParser:
    summary, _, codes = (__doc__ or "").partition("Exit codes:")
    parser = argparse.ArgumentParser(
        "python -m qpass", description=summary.splitlines()[0], epilog=f"Exit codes:{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="command")
    one = commands.add_parser("diff", help="what changed between two saved programs")
    one.add_argument("a", type=Path)
    one.add_argument("b", type=Path)
    one.add_argument("--html", type=Path, metavar="FILE", help="write it as a page, too")
    one.add_argument("--json", action="store_true", help="print JSON")
    one.add_argument(
        "--fail-if", type=condition, action="append", default=[], metavar="KIND=OPERATOR",
        help="exit with 1 when such a node was added, removed, rewired or retargeted (changed: any of these)",
    )  # fmt: skip
    one.set_defaults(run=diff)
    two = commands.add_parser("report", help="what is quantized in a saved model, what is not, and why")
    two.add_argument("model", type=Path)
    two.add_argument("--html", type=Path, metavar="FILE", help="write it as a page, too")
    two.add_argument("--json", action="store_true", help="print JSON")
    two.add_argument("--strict", action="store_true", help="exit with 1 when something asked for was not done")
    two.set_defaults(run=report)
    commands.add_parser("env", help="versions and capabilities").set_defaults(run=env)
    return parser


if __name__ == "__main__":
    sys.exit(main())
