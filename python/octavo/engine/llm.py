"""Offline generation: `LLM(model).generate(prompts, SamplingParams(...))`, shaped like vLLM's."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterable, Sequence
from typing import Any

from tqdm import tqdm

from octavo import _core
from octavo.answers import ModelAnswers, ToolUse
from octavo.chat import read_chat
from octavo.config import EngineConfig
from octavo.engine.engine import Engine
from octavo.engine.outputs import OutputBuilder, embedding_output, tell_apart
from octavo.engine.prompts import PromptInput, TokensPrompt, encode_prompt
from octavo.engine.step_thread import StepThread
from octavo.outputs import EmbeddingRequestOutput, RequestOutput
from octavo.pooling import PoolingParams, first_tokens
from octavo.sampling_params import SamplingParams
from octavo.structured_outputs import compile_grammar
from octavo.vllm_flags import without_vllm_options

logger = logging.getLogger(__name__)

Message = dict[str, Any]


class LLM:
    """A model in this process. Calls return when all prompts are done; those of several threads run
    one after another.

    `close` gives its memory back, as does leaving `with LLM(...) as llm:`. In a process that is
    forked afterwards neither this object nor a new one works: start processes by spawn.

    Keyword arguments are the fields of `octavo.EngineConfig` but `max_waiting`:
    `LLM("a/model", dtype="bfloat16")`. Those of vLLM's that ask for nothing here, such as
    `trust_remote_code`, are accepted with a warning.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, **options: Any) -> None:
        if "max_waiting" in options:
            raise ValueError(
                f"max_waiting = {options['max_waiting']!r}: not an option of LLM, which queues all prompts of a call; "
                "it bounds the queue of AsyncEngine and of the server"
            )
        if model is not None:
            options["model"] = model
        if (older := options.pop("override_pooler_config", None)) is not None:  # vLLM's name before 0.11
            options.setdefault("pooler_config", older)
        known = [field.name for field in dataclasses.fields(EngineConfig)]
        options, without_effect = without_vllm_options(options, known)
        for line in without_effect:
            logger.warning("%s", line)
        config = EngineConfig(**options)
        # All prompts of a call are queued at once: the bound protects servers, not lists that the
        # caller already holds.
        self._engine = Engine.from_config(dataclasses.replace(config, max_waiting=2**20))
        self._thread = StepThread(self._engine)
        parts = self._engine.parts
        self._answers = ModelAnswers(parts.config, parts.chat_template, parts.tokenizer)

    def close(self) -> None:
        """Gives back the memory of model and KV cache, on a GPU to the device. Idempotent; nothing
        can be generated afterwards.
        """
        self._thread.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def config(self) -> EngineConfig:
        """The configuration the engine runs with."""
        return self._engine.parts.config

    @property
    def core(self) -> _core.EngineCore:
        """The Rust core, for its statistics and checks."""
        return self._engine.core

    def get_tokenizer(self) -> _core.Tokenizer | None:
        """The model's tokenizer, or None for a model without one."""
        return self._engine.parts.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What is used where none are given: the model's own defaults, see
        `EngineConfig.generation_config`.
        """
        return SamplingParams.with_defaults(self._engine.parts.generation_defaults, {})

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes each prompt: text, `{"prompt": text}` or `{"prompt_token_ids": [...]}`. Outputs
        come in the order of the prompts.

        Raises `ValueError` naming the prompt's number and field before anything runs. A request
        that fails while it runs costs no other: its output has the `finish_reason` "error" and says
        why in `error`.
        """
        self._engine.check_usable()
        if isinstance(prompts, (bytes, bytearray)) or not isinstance(prompts, Iterable):
            raise ValueError(f"prompts: expected a prompt or a list of them, got {type(prompts).__name__}")
        listed: list[PromptInput] = [prompts] if isinstance(prompts, (str, dict)) else list(prompts)
        encoded = [self._encode(number, prompt) for number, prompt in enumerate(listed)]
        return self._run(listed, encoded, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or a list of them, through the model's chat template.

        Messages are those of OpenAI's chats, and checked like a request's; keys that these do not
        have go to the template as they are. Of each choice `text` is all that the model wrote;
        `reasoning`, `content` and `tool_calls` are its parts. With `continue_final_message`, and
        without `add_generation_prompt`, the model goes on with the last message. Raises `ValueError`
        that names the message.
        """
        self._engine.check_usable()
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message: not together with add_generation_prompt")
        tokenizer, template = self._engine.parts.tokenizer, self._engine.parts.chat_template
        if tokenizer is None or template is None:
            raise ValueError("messages: this model has no tokenizer or no chat template; use generate()")
        if not messages:
            raise ValueError("messages: must not be empty")
        single = isinstance(messages[0], dict)
        conversations: list[Any] = [messages] if single else list(messages)
        encoded = []
        for number, conversation in enumerate(conversations):
            try:
                messages_json, tools_json = read_chat(conversation, tools, template.takes_tools)
                prompt = tokenizer.encode_chat(
                    template,
                    messages_json,
                    tools_json=tools_json,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    kwargs_json=None if chat_template_kwargs is None else json.dumps(chat_template_kwargs),
                )
            except ValueError as error:
                if single:
                    raise
                raise type(error)(f"conversation {number}: {error}") from error
            encoded.append(prompt)
        prompts: list[PromptInput] = [TokensPrompt(prompt_token_ids=prompt.token_ids) for prompt in encoded]
        if tools:
            self._answers.warn()
        tool_use = ToolUse([tool["function"]["name"] for tool in tools or ()])
        formats = [self._answers.format(prompt, tool_use) for prompt in encoded]
        params = [
            self._answers.params(format, self._answers.leaves_room(prompt, params))
            for format, prompt, params in zip(
                formats, encoded, self._each_params(encoded, sampling_params), strict=True
            )
        ]
        outputs = self._run(prompts, encoded, params, use_tqdm)
        for format, output in zip(formats, outputs, strict=True):
            for choice in output.outputs:
                tell_apart(format, choice)
        return outputs

    def embed(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """An embedding of each prompt, in their order: as the model's files and `pooler_config` say, else
        its last token's hidden state after the last norm, normalised.

        truncate_prompt_tokens: only so many first tokens of a prompt count, with what the tokenizer adds at
        its end; -1: the model's length.
        Raises `ValueError` naming the prompt's number and field before anything runs. A request that
        fails while it runs costs no other: its output has an empty embedding and says why in `error`.
        """
        self._engine.check_usable()
        parts = self._engine.parts
        if parts.embeddings is None:
            raise ValueError("embed: this model was loaded with runner = 'generate'; leave that out, or use 'pooling'")
        if isinstance(prompts, (bytes, bytearray)) or not isinstance(prompts, Iterable):
            raise ValueError(f"prompts: expected a prompt or a list of them, got {type(prompts).__name__}")
        most = parts.core.longest_embedding if truncate_prompt_tokens == -1 else truncate_prompt_tokens
        if most is not None and (type(most) is not int or not 1 <= most <= parts.max_model_len):
            raise ValueError(f"truncate_prompt_tokens = {most!r}: must be from 1 to {parts.max_model_len}, or -1")
        listed: list[PromptInput] = [prompts] if isinstance(prompts, (str, dict)) else list(prompts)
        encoded = [self._encode(number, prompt) for number, prompt in enumerate(listed)]
        if most is not None:
            plain = [encode_prompt(prompt, parts.tokenizer, add_special_tokens=False) for prompt in listed]
            encoded = [first_tokens(whole, own, most) for whole, own in zip(encoded, plain, strict=True)]
        given = pooling_params if pooling_params is not None else PoolingParams()
        each = [given] * len(encoded) if isinstance(given, PoolingParams) else list(given)
        if len(each) != len(encoded) or not all(isinstance(params, PoolingParams) for params in each):
            raise ValueError(
                f"pooling_params: expected PoolingParams, or a list of {len(encoded)}, one for each prompt"
            )
        checked = []
        for number, params in enumerate(each):
            try:
                checked.append(parts.embeddings.checked(params).to_core())
            except ValueError as error:
                raise ValueError(f"prompts[{number}]: {error}") from error
        neutral = [SamplingParams()] * len(encoded)
        outputs = self._thread.run(lambda: self._complete(listed, encoded, neutral, checked, use_tqdm))
        return [embedding_output(output) for output in outputs]

    def _encode(self, number: int, prompt: PromptInput) -> _core.Prompt:
        try:
            return encode_prompt(prompt, self._engine.parts.tokenizer)
        except ValueError as error:
            raise ValueError(f"prompts[{number}]: {error}") from error

    def _run(
        self,
        prompts: list[PromptInput],
        encoded: list[_core.Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        if not self._engine.parts.generates:
            raise ValueError("this model makes embeddings alone (runner = 'pooling'): use embed()")
        params = self._each_params(encoded, sampling_params)
        checked = [
            self._to_core(number, given, prompt)
            for number, (given, prompt) in enumerate(zip(params, encoded, strict=True))
        ]
        return self._thread.run(lambda: self._complete(prompts, encoded, params, checked, use_tqdm))

    def _to_core(self, number: int, params: SamplingParams, prompt: _core.Prompt) -> _core.SamplingParams:
        try:
            grammar = compile_grammar(self._engine.parts.grammars, params.structured_outputs)
            return params.to_core(self._answers.of_model(params, [prompt], grammar))
        except ValueError as error:
            raise type(error)(f"prompts[{number}]: {error}") from error

    def _each_params(
        self, encoded: list[_core.Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        """Of each prompt."""
        if sampling_params is None:
            defaults, longest = self.get_default_sampling_params(), self._engine.parts.max_model_len
            params = [defaults.fitting(longest - len(prompt)) for prompt in encoded]
        elif isinstance(sampling_params, SamplingParams):
            params = [sampling_params] * len(encoded)
        elif not isinstance(sampling_params, Sequence):
            raise ValueError(
                f"sampling_params: expected SamplingParams or a list of them, got {type(sampling_params).__name__}"
            )
        else:
            params = list(sampling_params)
            for number, given in enumerate(params):
                if not isinstance(given, SamplingParams):
                    raise ValueError(f"sampling_params[{number}]: expected SamplingParams, got {type(given).__name__}")
        if len(params) != len(encoded):
            raise ValueError(
                f"sampling_params: {len(params)} given for {len(encoded)} prompts; pass one, or one for each"
            )
        return params

    def _complete(
        self,
        prompts: list[PromptInput],
        encoded: list[_core.Prompt],
        params: list[SamplingParams],
        checked: list[_core.SamplingParams],
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        """Runs all of a call's requests to their end."""
        builders: dict[int, OutputBuilder] = {}
        outputs: dict[int, RequestOutput] = {}
        try:
            self._submit(prompts, encoded, params, checked, builders)
            with tqdm(total=len(prompts), desc="Prompts", disable=not use_tqdm, dynamic_ncols=True) as bar:
                while len(outputs) < len(builders):
                    self._engine.step()
                    for request_id in self._engine.core.take_news():
                        if request_id not in builders:  # of an earlier call that was interrupted more than once
                            self._engine.core.abort(request_id)
                            continue
                        delta = self._engine.core.take(request_id)
                        if delta is None:
                            continue
                        output = builders[request_id].add(delta)
                        if delta.finished:
                            outputs[request_id] = output
                            bar.update()
        except BaseException as error:
            self._abandon(builders, error)
            raise
        failed = [output.error for output in outputs.values() if output.error is not None]
        if failed:
            logger.warning("%d of %d requests ended with an error; the first: %s", len(failed), len(outputs), failed[0])
        return [outputs[request_id] for request_id in builders]

    def _submit(
        self,
        prompts: list[PromptInput],
        encoded: list[_core.Prompt],
        params: list[SamplingParams],
        checked: list[_core.SamplingParams],
        builders: dict[int, OutputBuilder],
    ) -> None:
        calls = zip(prompts, encoded, params, checked, strict=True)
        for number, (prompt, tokens, wanted, of_core) in enumerate(calls):
            try:
                request_id = self._engine.core.add_call([tokens], of_core, now=time.monotonic())
            except ValueError as error:
                raise type(error)(f"prompts[{number}]: {error}") from error
            builders[request_id] = OutputBuilder(request_id, prompt, tokens, wanted, self._engine.parts.tokenizer)

    def _abandon(self, builders: dict[int, OutputBuilder], reason: BaseException) -> None:
        """Ends the call's requests. Nothing that fails here may hide the reason."""
        try:
            for request_id in builders:
                self._engine.core.abort(request_id)
            self._settle()
        except Exception:
            logger.exception("after %s, the engine could not be settled", type(reason).__name__)

    def _settle(self) -> None:
        """Steps until aborted requests have left, so that the next call starts clean."""
        while self._engine.step():
            pass
        for request_id in self._engine.core.take_news():
            self._engine.core.take(request_id)
