"""``python -m icecache``: the command line without a script on the path."""

from icecache.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
