"""What ``swift rlhf --external_plugins`` imports: puts VGS in the place of swift's GKD trainer."""

import vgs.integrations.swift  # noqa: F401
