"""Chat templates: a model's own Jinja template turns messages into the text it was trained on.

Templates come with the weights and are not trusted: they run in Jinja's immutable sandbox, with
the options and helpers that transformers gives them.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment


def render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool,
    special: Mapping[str, str],
) -> str:
    """The conversation as text, special tokens spelled out.

    Args:
        template: Jinja source.
        messages: `{"role": ..., "content": ...}` in order.
        add_generation_prompt: end with the opening of the assistant's turn.
        special: `bos_token`, `eos_token` and so on, by the names that templates use.

    Raises:
        ValueError: the template is broken or refuses these messages.
    """
    try:
        return _compiled(template).render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special,
        )
    except Exception as error:  # a template is a program of others, and may raise anything
        reason = " ".join(str(error).split())
        raise ValueError(f"the model's chat template refuses these messages: {reason}") from None


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
