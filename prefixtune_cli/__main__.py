"""`python -m prefixtune_cli` is `ptp`."""

from prefixtune_cli.cli.app import main

if __name__ == "__main__":
    main()
