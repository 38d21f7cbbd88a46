"""``python -m localize`` is ``localize``."""

from localize.cli.app import main

if __name__ == "__main__":
    main()
