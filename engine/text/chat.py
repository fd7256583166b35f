"""A run's parameters to the text that the model reads, by the model's own chat template."""

from __future__ import annotations

from typing import Any

from engine.errors import RunError
from engine.text import templates
from engine.text.tokenizer import Vocabulary


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
    variables = {
        "messages": messages,
        "add_generation_prompt": True,
        "bos_token": vocabulary.name(vocabulary.begin),
        "eos_token": vocabulary.name(vocabulary.end),
        "tools": None,
        "documents": None,
    }
    try:
        return templates.render(vocabulary.chat_template, variables)
    except templates.TemplateError as error:
        text = f"the model's chat template refuses these messages: {error}"
        raise RunError("bad_parameters", text) from error


def prompt_tokens(vocabulary: Vocabulary, parameters: dict[str, Any]) -> list[int]:
    """Token ids of a run's prompt, chat template included. Raises RunError `bad_parameters`."""
    return vocabulary.encode(render(vocabulary, parameters))
