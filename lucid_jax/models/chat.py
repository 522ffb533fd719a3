"""Chat templates: a conversation as the text that a model was trained on.

A template comes with a checkpoint, so it is a stranger's program: it runs in Jinja's sandbox.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Message: TypeAlias = Mapping[str, Any]
"""What is said: `role` ("system", "user", "assistant"), `content`, and what else a template knows."""


class ChatTemplate:
    """A Jinja template as in `tokenizer_config.json`, `chat_template.jinja` or a GGUF file.

    Attributes:
      source: the template.
      tokens: what it calls `bos_token`, `eos_token` and so on.

    Example:
      >>> template = ChatTemplate("{{ bos_token }}{{ messages[0].content }}", {"bos_token": "<s>"})
      >>> template.render([{"role": "user", "content": "Hello"}])  # doctest: +SKIP
      '<s>Hello'
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None):
        """Takes the template; it is compiled when it is first used."""
        self.source = source
        self.tokens = dict(tokens or {})

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of a conversation, special tokens spelled out.

        Args:
          messages: what was said so far, oldest first.
          add_generation_prompt: whether to end with what opens the assistant's answer.
          variables: what else the template reads, such as `tools` or `enable_thinking`.

        Raises:
          ValueError: if the template is broken, or refuses the messages.
          ModuleNotFoundError: without Jinja, which the `gguf` extra has.
        """
        environment = _environment()
        import jinja2  # after the above, which says how to get it

        said = [{k: v for k, v in one.items() if v is not None} for one in messages]
        try:
            # The sandbox guards plain values; others may have methods that write files.
            plain = json.loads(json.dumps({"tools": None, **variables, "messages": said}))
            template = environment.from_string(self.source)
            text: str = template.render(
                **{**self.tokens, **plain}, add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses: {error}") from error
        except (TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise ValueError(
                f"the chat template fails on these messages ({type(error).__name__}: {error}); each "
                "needs a role and a content"
            ) from error
        return text


def read_template(settings: Mapping[str, Any], source: str | None = None) -> ChatTemplate | None:
    """The template of a Hugging Face folder, if it has one.

    Args:
      settings: the content of tokenizer_config.json.
      source: that of chat_template.jinja, which has the last word.

    Raises:
      ValueError: if `chat_template` is neither text nor a list with one named "default".
    """
    if source is None:
        source = settings.get("chat_template")
    if isinstance(source, list):
        named = [one for one in source if isinstance(one, dict) and one.get("name") == "default"]
        source = named[0].get("template") if named else source
    if source is None:
        return None
    if not isinstance(source, str):
        raise ValueError(
            "tokenizer_config.json must have a text as chat_template, or a list of them with one named "
            f"default, got {source!r}"
        )
    return ChatTemplate(source, special_tokens(settings))


def special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the others of tokenizer_config.json."""
    found = {}
    for key, value in settings.items():
        value = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(value, str):
            found[key] = value
    return found


@functools.cache
def _environment() -> Any:
    """Jinja as transformers sets it up for chat templates."""
    try:
        import jinja2.ext
        import jinja2.sandbox
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "chat templates need the jinja2 package; install it with: pip install 'lucid-jax[gguf]'",
            name=error.name,
        ) from error

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what a model said, for training: its body as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _now
    return environment


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """JSON without Jinja's escapes for HTML."""
    return json.dumps(value, **{"ensure_ascii": False, "indent": indent, **options})


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
