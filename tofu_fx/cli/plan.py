"""`tofu-fx plan show` and `tofu-fx plan diff`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tofu_fx.cli.command import Command, add_debug, require_folder

#: exit code of `plan diff` where the plans differ (1 and 2 say that it could not compare them)
DIFFERENT = 3

EPILOG = f"""\
examples:
  tofu-fx plan show plan.json --plot plan.png
  tofu-fx plan diff plan.json edited.json || test $? -eq {DIFFERENT}

exit codes of `plan diff`: 0 the plans do the same, {DIFFERENT} they differ, 1 a file could not be read
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="print a plan as a table", description="Print a plan as a table.")
    show.add_argument("plan", type=Path, help="a plan, as `tofu-fx calibrate` writes it")
    show.add_argument("--plot", type=Path, metavar="FILE", help="draw it into a picture, too")
    show.set_defaults(run=_show)
    diff = actions.add_parser(
        "diff",
        help="print the sites at which two plans differ",
        description="Print the sites at which two plans differ: in how many tokens go, how, or compared by what.",
        epilog=f"exit codes: 0 the plans do the same, {DIFFERENT} they differ, 1 a file could not be read",
    )
    diff.add_argument("first", type=Path)
    diff.add_argument("second", type=Path)
    diff.set_defaults(run=_diff)
    add_debug(show)
    add_debug(diff)


def _show(args: argparse.Namespace) -> None:
    from rich.console import Console

    from tofu_fx import Plan

    require_folder(args.plot, "--plot")
    plan = Plan.load(args.plan)
    Console().print(plan.table())
    if args.plot is not None:
        plan.plot(args.plot)


def _diff(args: argparse.Namespace) -> int:
    from rich.console import Console

    from tofu_fx import Plan
    from tofu_fx.plan.table import differences, plan_diff

    first, second = Plan.load(args.first), Plan.load(args.second)
    if not differences(first, second):
        Console().print("no difference")
        return 0
    Console().print(plan_diff(first, second, (str(args.first), str(args.second))))
    return DIFFERENT


# `run` is set by the actions.
COMMAND = Command("plan", "show a plan, or what differs between two", _add_arguments, _show, EPILOG)
