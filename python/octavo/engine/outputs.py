"""From the core's deltas to vLLM-shaped outputs: one builder a request, fed with what `take`
returned.
"""

from __future__ import annotations

import dataclasses

from octavo import _core
from octavo.engine.prompts import PromptInput, prompt_text
from octavo.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    ToolCall,
)
from octavo.sampling_params import SamplingParams


def tell_apart(format: _core.AnswerFormat | None, choice: CompletionOutput) -> None:
    """Fills in the parts of a choice that has ended."""
    if format is None:
        choice.content = choice.text
        return
    choice.reasoning, choice.content, calls = format.read(choice.text)
    choice.tool_calls = [ToolCall(name, arguments) for name, arguments in calls]


def embedding_output(output: RequestOutput) -> EmbeddingRequestOutput:
    """Of a request that asked for an embedding and has ended."""
    return EmbeddingRequestOutput(
        request_id=output.request_id,
        outputs=EmbeddingOutput(output.embedding or []),
        prompt_token_ids=output.prompt_token_ids,
        finished=output.finished,
        num_cached_tokens=output.num_cached_tokens,
        error=output.error,
    )


class OutputBuilder:
    """Accumulates the choices of one request: the whole output so far, as vLLM's generators give
    it.
    """

    def __init__(
        self,
        request_id: int,
        prompt: PromptInput,
        encoded: _core.Prompt,
        params: SamplingParams,
        tokenizer: _core.Tokenizer | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._wants_prompt = params.prompt_logprobs is not None
        self._output = RequestOutput(
            request_id=str(request_id),
            prompt=prompt_text(prompt),
            prompt_token_ids=encoded.token_ids,
            outputs=[
                CompletionOutput(index)
                if params.logprobs is None
                else CompletionOutput(index, logprobs=[], cumulative_logprob=0.0)
                for index in range(params.n)
            ],
            finished=False,
        )

    def add(self, delta: _core.ReplyDelta) -> RequestOutput:
        """Adds what is new and returns the output itself, which the next call changes."""
        output = self._output
        output.finished = delta.finished
        output.error = None if delta.error is None else str(delta.error)
        for request in delta.requests:
            output.num_cached_tokens = request.num_cached_tokens
            output.metrics = RequestMetrics(*request.times)
        for choice in delta.choices:
            if self._wants_prompt and (prompt := choice.prompt_logprobs) is not None:
                output.prompt_logprobs = [None, *map(self._named, prompt)]
                self._wants_prompt = False  # each choice brings them
            if (embedding := choice.embedding) is not None:
                output.embedding = embedding.tolist()
            completion = output.outputs[choice.index]
            completion.text += choice.text
            completion.token_ids.extend(choice.token_ids)
            if choice.logprobs is not None and completion.logprobs is not None:
                completion.logprobs.extend(self._named(position) for position in choice.logprobs)
                drawn = sum(position[0][1] for position in choice.logprobs)
                completion.cumulative_logprob = (completion.cumulative_logprob or 0.0) + drawn
            completion.finish_reason = choice.finish_reason
            completion.stop_reason = choice.stop_reason
        return output

    def snapshot(self) -> RequestOutput:
        """The output so far, which stays as it is. Lists are copied, what is in them is shared: it
        never changes.
        """
        return dataclasses.replace(
            self._output,
            outputs=[
                dataclasses.replace(
                    choice,
                    token_ids=choice.token_ids.copy(),
                    logprobs=None if choice.logprobs is None else choice.logprobs.copy(),
                )
                for choice in self._output.outputs
            ],
        )

    def _named(self, position: list[tuple[int, float, int]]) -> dict[int, Logprob]:
        return {token: Logprob(logprob, rank, self._text_of(token)) for token, logprob, rank in position}

    def _text_of(self, token: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.decode([token], skip_special_tokens=False)
