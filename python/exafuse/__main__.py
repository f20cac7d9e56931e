"""``python -m exafuse``: the same commands as the ``exafuse`` script."""

from exafuse.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
