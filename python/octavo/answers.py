"""How a model's answers are read: what is reasoning, what is a call of a tool.

The formats come from the chat template, or from `tool_call_parser` and `reasoning_parser`; what a
request says of its tools decides which of them counts. The reading itself is Rust
(`_core.AnswerFormat`). Knows nothing of HTTP.
"""

import dataclasses
import logging
from collections.abc import Sequence

from octavo import _core
from octavo.config import PARSER_AUTO, PARSER_NONE, EngineConfig
from octavo.errors import FieldError
from octavo.sampling_params import OfModel, SamplingParams

logger = logging.getLogger(__name__)

_NO_BUDGET = 2**32 - 1
"""More tokens than any answer has."""


@dataclasses.dataclass(frozen=True)
class ToolUse:
    """What a request wants of tools. Without tools there are no calls."""

    names: Sequence[str] = ()
    forbidden: bool = False
    """The model sees the tools, and what looks like a call is content (`tool_choice` none)."""
    parallel: bool = True
    """Else all calls but the first are left out."""
    required: bool = False
    """The answer is a list of calls, and nothing else (`tool_choice` required)."""
    named: str | None = None
    """The answer is the arguments of a call of this tool (`tool_choice` with a name)."""


class ModelAnswers:
    """The formats of one model: `calls` and `reasoning` are names as `_core.AnswerFormat` knows them, or
    None.
    """

    def __init__(
        self, config: EngineConfig, template: _core.ChatTemplate | None, tokenizer: _core.Tokenizer | None
    ) -> None:
        self._tokenizer = tokenizer
        self.calls = _chosen(config.tool_call_parser, None if template is None else template.call_format)
        shown = None if template is None else template.reasoning
        if shown is None and template is not None and tokenizer is not None and tokenizer.token_to_id("</think>"):
            shown = "think"
        self.reasoning = _chosen(config.reasoning_parser, shown)
        takes_tools = template is not None and template.takes_tools
        self._is_unknown = takes_tools and self.calls is None and config.tool_call_parser == PARSER_AUTO

    def warn(self) -> None:
        """Logs that calls of tools will stay text, where the template has a format that nobody knows."""
        if self._is_unknown:
            logger.warning(
                "calls of tools stay text: the chat template shows none of the known formats; name one with "
                "--tool-call-parser"
            )

    def format(
        self, prompt: _core.Prompt, tools: ToolUse, *, include_reasoning: bool = True
    ) -> _core.AnswerFormat | None:
        """How to read the answer to a prompt; None where it is text and nothing else."""
        if tools.required or tools.named is not None:
            # The constraint leaves no room for reasoning.
            return _core.AnswerFormat(
                calls="required", named=tools.named, tools=tools.names, single_call=not tools.parallel
            )
        calls = self.calls if tools.names and not tools.forbidden else None
        if calls is None and self.reasoning is None:
            return None
        return _core.AnswerFormat(
            reasoning=self.reasoning,
            drops_reasoning=not include_reasoning,
            begins_in_reasoning=self._begins_in_reasoning(prompt),
            calls=calls,
            tools=tools.names,
            single_call=not tools.parallel,
        )

    def params(self, format: _core.AnswerFormat | None, params: SamplingParams) -> SamplingParams:
        """The parameters with which a format can be read: markers that are special tokens must not
        be left out of the text.
        """
        special = {} if self._tokenizer is None else self._tokenizer.special_tokens
        if format is None or not any(marker in special for marker in format.markers):
            return params
        return dataclasses.replace(params, skip_special_tokens=False)

    def leaves_room(self, prompt: _core.Prompt, params: SamplingParams) -> SamplingParams:
        """The parameters of a chat. What its answer must look like counts behind the reasoning, where the
        prompt opens that: it ends where the model ends it, unless there is a budget.
        """
        is_bound = params.structured_outputs is not None and params.thinking_token_budget is None
        if not is_bound or not self._begins_in_reasoning(prompt):
            return params
        return dataclasses.replace(params, thinking_token_budget=_NO_BUDGET)

    def of_model(
        self, params: SamplingParams, prompts: Sequence[_core.Prompt], grammar: _core.Grammar | None
    ) -> OfModel:
        """What parameters for these prompts are for the model. Raises `ValueError` that names the
        field. Tokenises bad words, which takes milliseconds.
        """
        bad_words = spellings(self._tokenizer, params.bad_words) if params.bad_words else None
        thinking = None
        if params.thinking_token_budget is not None:
            if self.reasoning is None or self._tokenizer is None:
                raise FieldError(
                    f"thinking_token_budget = {params.thinking_token_budget}: this model's chat template shows no "
                    "reasoning; leave it out, or name the reasoning's form with --reasoning-parser",
                    "thinking_token_budget",
                    "unsupported_parameter",
                )
            begins = {self._begins_in_reasoning(prompt) for prompt in prompts}
            if len(begins) > 1:
                raise FieldError(
                    "thinking_token_budget: some prompts of the call end within the reasoning and some do not; send "
                    "them in calls of their own",
                    "thinking_token_budget",
                )
            if grammar is None or True in begins:  # a grammar that counts from the first token leaves no room for it
                thinking = _core.ThinkingBudget(
                    self._tokenizer, self.reasoning, tokens=params.thinking_token_budget, begins_inside=True in begins
                )
        return OfModel(grammar, bad_words, thinking)

    def _begins_in_reasoning(self, prompt: _core.Prompt) -> bool:
        if self.reasoning is None or self._tokenizer is None:
            return False
        opening = _core.AnswerFormat(reasoning=self.reasoning).markers[0]
        return self._tokenizer.ends_with(prompt, opening)


def spellings(tokenizer: _core.Tokenizer | None, words: Sequence[str]) -> list[list[int]]:
    """The tokens of words, as vLLM bans them: each as it begins a text, and as it stands behind a
    space where that is as many tokens with another first one. Raises `FieldError`.
    """
    if tokenizer is None:
        raise FieldError("bad_words: this model has no tokenizer; use logit_bias", "bad_words")
    found = []
    for position, word in enumerate(words):
        alone, behind = (
            list(tokenizer.encode_text(text, add_special_tokens=False).token_ids)
            for text in (word.lstrip(), " " + word.lstrip())
        )
        if not alone:
            raise FieldError(f"bad_words[{position}]: no token of this model writes it", "bad_words")
        found.append(alone)
        if behind and len(behind) == len(alone) and behind[0] != alone[0]:
            found.append(behind)
    return found


def _chosen(parser: str, shown: str | None) -> str | None:
    return shown if parser == PARSER_AUTO else None if parser == PARSER_NONE else parser
