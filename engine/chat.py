"""A run's parameters to the text that the model reads, by the model's own chat template.

Templates come with model files, so they run in jinja2's immutable sandbox.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import RunError
from engine.tokenizer import Vocabulary


class _TemplateRefuses(Exception):
    """The template called raise_exception."""


def _raise(message: str) -> NoReturn:
    raise _TemplateRefuses(message)


@functools.lru_cache(maxsize=16)
def _template(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise
    return environment.from_string(source)


def render(vocabulary: Vocabulary, parameters: dict[str, Any]) -> str:
    """The prompt as text. A plain `prompt` is one user message where the model has a chat template.

    Raises RunError `bad_parameters` when the template refuses the messages or the model has none for them.
    """
    prompt, messages = parameters.get("prompt"), parameters.get("messages")
    if (prompt is None) == (messages is None):
        raise RunError("bad_parameters", "exactly one of prompt and messages is needed")
    if vocabulary.chat_template is None:
        if prompt is None:
            raise RunError("bad_parameters", "this model has no chat template: send a prompt, not messages")
        return str(prompt)
    if prompt is not None:
        messages = [{"role": "user", "content": str(prompt)}]
    try:
        return _template(vocabulary.chat_template).render(
            messages=messages,
            add_generation_prompt=True,
            bos_token=vocabulary.name(vocabulary.begin),
            eos_token=vocabulary.name(vocabulary.end),
        )
    except (jinja2.TemplateError, _TemplateRefuses, TypeError, KeyError, ValueError) as error:
        raise RunError(
            "bad_parameters", f"the model's chat template refuses these messages: {error}"
        ) from error


def prompt_tokens(vocabulary: Vocabulary, parameters: dict[str, Any]) -> list[int]:
    """Token ids of a run's prompt, chat template included. Raises RunError `bad_parameters`."""
    return vocabulary.encode(render(vocabulary, parameters))
