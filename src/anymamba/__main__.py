"""`python -m anymamba` is `anymamba`."""

from anymamba.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
