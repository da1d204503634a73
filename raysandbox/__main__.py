"""``python -m raysandbox``."""

from __future__ import annotations

from raysandbox.cli import main

if __name__ == "__main__":
    main()
