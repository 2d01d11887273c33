"""VGS in verl 0.9: an FSDP2 engine for the actor, and an agent loop that also renders the prompt without its images.

verl loads this package by itself (entry point group ``verl.plugins``) and uses it where ``VERL_ENGINE_VENDOR=vgs`` is
set; see docs/hosts.md. ``python -m vgs.integrations.verl`` says whether it does.
"""

from __future__ import annotations

import os

#: What ``VERL_ENGINE_VENDOR`` must be, and the name under which verl keeps the engine.
VENDOR = "vgs"
#: Of the agent loop, for ``rollout.agent.default_agent_loop`` or the column ``agent_name``.
AGENT_LOOP = "vgs_single_turn"


def chosen() -> bool:
    """Whether this process is to train with VGS."""
    return os.environ.get("VERL_ENGINE_VENDOR") == VENDOR


if chosen():  # other runs of verl in the same environment import nothing of ours
    from . import agent_loop, engine  # noqa: F401
