"""One turn of verl's agent loop that also leaves the prompt without its images, for the text-only view."""

from __future__ import annotations

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from ...data.messages import remove_evidence
from ...models.tokenizers import media_tokens
from . import AGENT_LOOP
from .batches import TEXT_PROMPT

NEVER = -100.0  # a logit bias: the least that vLLM takes


@register(AGENT_LOOP)
class VGSAgentLoop(SingleTurnAgentLoop):
    """verl's single turn, with ``extra_fields["text_prompt_ids"]``: the same conversation rendered without images."""

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:
        """As verl's, see there; no token of an image is sampled."""
        processor = self.processor or self.tokenizer
        ids = self.tokenizer.convert_tokens_to_ids(media_tokens(processor))
        bias = {**(sampling_params.get("logit_bias") or {}), **dict.fromkeys(ids, NEVER)}
        output = await super().run({**sampling_params, "logit_bias": bias}, priority, **kwargs)
        messages = remove_evidence(list(kwargs["raw_prompt"]))
        output.extra_fields[TEXT_PROMPT] = await self.ct_build_initial_tokens(messages)
        return output
