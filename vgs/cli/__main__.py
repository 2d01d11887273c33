"""``python -m vgs.cli``: the command, for launchers such as ``accelerate launch -m``."""

from .start import main

raise SystemExit(main())
