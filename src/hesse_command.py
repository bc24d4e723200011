"""The command `hesse`, which ends in one line also where Ctrl-C comes while torch is imported."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from hesse.cli import main as run
    except KeyboardInterrupt:
        print("hesse: stopped", file=sys.stderr)
        raise SystemExit(130) from None
    run()
