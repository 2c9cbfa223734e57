"""``python -m leap_serve.cli``, the same as the command ``leap``."""

from leap_serve.cli import main

raise SystemExit(main())
