"""The command: see the package."""

from __future__ import annotations

import argparse

from tests.replay import STORE, accept, difference, pending
from tests.zoo import CATALOGUE


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.replay")
    parser.add_argument("--accept", action="store_true", help="store the graphs that the last test run made")
    given = parser.parse_args()
    changed = pending()
    if not changed:
        print("nothing has changed, as far as the last run of pytest tests/models/test_catalogue.py goes")
        return
    if given.accept:
        names = accept(CATALOGUE)
        print(f"stored {len(names)} changed graphs ({STORE.stat().st_size / 1000:.0f} kB): {', '.join(names)}")
        return
    print(f"{len(changed)} models have changed: {', '.join(changed)}")
    name, text = next(iter(changed.items()))
    print(f"{name}:\n{difference(name, text)}\nIf that is meant: python -m tests.replay --accept")


if __name__ == "__main__":
    main()
