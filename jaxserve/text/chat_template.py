"""Chat messages to one prompt, by the model's own Jinja template, in a sandbox. Knows no tokenizer and no server.

Invariant: the text equals that of transformers' `apply_chat_template` for the same template and messages; whatever a
template does wrong is a RequestError with its message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxserve.core.errors import ConfigError, RequestError
from jaxserve.text.folder import read_json

TEMPLATES_MAX = 32                    # compiled at once
OWN_NAMES = frozenset(
    ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize")
)
_MARK = "JAXSERVE_CONTINUES_HERE "    # its trailing space tells whether the template trims messages
_REASONING = ("reasoning_content", "thinking", "reasoning")

Message = Mapping[str, object]


class ChatTemplate:
    """The templates of one model; `names` are theirs, the one used unless another is asked for is "default"."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._templates, self._special_tokens = dict(templates), dict(special_tokens)

    @property
    def is_defined(self) -> bool:
        return bool(self._templates)

    def render(
        self,
        messages: Sequence[Message],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt of a conversation.

        Args:
          chat_template: a template's name or text, instead of the default one.
          continue_final_message: leave the last message open, so that the model continues it.
          template_kwargs: further variables of the template.
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError("continue_final_message and add_generation_prompt cannot both be true.")
        if not messages:
            raise RequestError("Cannot apply chat template to an empty conversation. Provide at least one message.")
        kwargs = dict(template_kwargs or {})
        for name in sorted(OWN_NAMES & kwargs.keys()):
            raise RequestError(f"chat_template_kwargs may not set {name!r}.", param="chat_template_kwargs")
        source = self._source(chat_template)
        template, reads_parts = _compiled(source)
        chat = [_plain(message, reads_parts) for message in messages]
        if continue_final_message:
            _mark_end(chat[-1])
        variables = {"tools": None, "documents": None, **self._special_tokens, **kwargs}
        text = _render(template, {**variables, "messages": chat, "add_generation_prompt": add_generation_prompt})
        return _cut_at_mark(text) if continue_final_message else text

    def _source(self, asked: str | None) -> str:
        if asked is not None:
            return self._templates.get(asked, asked)
        if "default" in self._templates:
            return self._templates["default"]
        if self._templates:
            raise RequestError(
                f"this model has several chat templates and no default: name one of {sorted(self._templates)}."
            )
        raise RequestError(
            "The served model has no chat template, so messages cannot become a prompt: send a plain prompt, "
            "or set --chat-template."
        )


def load_chat_template(folder: Path | None, override: str | None, special_tokens: Mapping[str, str]) -> ChatTemplate:
    """The templates of a model folder, under the operator's `--chat-template` (a path, a template, a name) if given.

    Raises ConfigError where that is none of them or not Jinja.
    """
    templates = _folder_templates(folder) if folder is not None else {}
    if override is not None:
        templates["default"] = _override(override, templates)
    for name, source in templates.items():
        if name == "default":
            try:
                _compiled(source)
            except RequestError as error:
                raise ConfigError(f"not valid Jinja: {error}; set another with --chat-template") from error
    return ChatTemplate(templates, special_tokens)


def _folder_templates(folder: Path) -> dict[str, str]:
    templates: dict[str, str] = {}
    declared = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(declared, str):
        templates["default"] = declared
    elif isinstance(declared, list):
        templates.update({entry["name"]: entry["template"] for entry in declared})
    if (path := folder / "chat_template.jinja").is_file():
        templates["default"] = path.read_text(encoding="utf-8")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    return templates


def _override(override: str, templates: Mapping[str, str]) -> str:
    if override in templates:
        return templates[override]
    if "{" in override or "\n" in override:
        return override
    try:
        return Path(override).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--chat-template {override!r} is neither a readable file ({error}) nor a template ({{{{ ... }}}}) "
            f"nor a name among {sorted(templates)}"
        ) from error


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the model wrote, for training; here it is plain text."""

    tags = {"generation"}   # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


_ENVIRONMENT = _environment()


@lru_cache(maxsize=TEMPLATES_MAX)
def _compiled(source: str) -> tuple[Template, bool]:
    """A template, and whether it reads message content as a list of parts."""
    try:
        return _ENVIRONMENT.from_string(source), _reads_parts(_ENVIRONMENT.parse(source))
    except TemplateSyntaxError as error:
        raise RequestError(f"chat template, line {error.lineno}: {error.message}") from error


def _reads_parts(tree: nodes.Template) -> bool:
    """Whether some loop goes over a message's content, directly or through a variable."""

    def is_content(node: nodes.Node | None) -> bool:
        if isinstance(node, nodes.Getattr):
            return node.attr == "content"
        return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "content"

    names = {
        assign.target.name
        for assign in tree.find_all(nodes.Assign)
        if isinstance(assign.target, nodes.Name) and is_content(assign.node)
    }
    loops = (loop.iter for loop in tree.find_all(nodes.For))
    return any(is_content(over) or (isinstance(over, nodes.Name) and over.name in names) for over in loops)


def _render(template: Template, variables: dict[str, object]) -> str:
    try:
        return template.render(variables)
    except TemplateError as error:
        raise RequestError(str(error.message or error)) from error
    except Exception as error:  # a template is somebody's program: any error of it is the request's or the template's
        message = f"The chat template cannot render these messages: {type(error).__name__}: {error}"
        raise RequestError(message) from error


def _plain(message: Message, reads_parts: bool) -> dict[str, object]:
    """One message as templates expect it: no None, tool arguments as objects, text parts joined if need be."""
    if not isinstance(message, Mapping):
        raise RequestError(f"a message must be an object, got {type(message).__name__}.", param="messages")
    plain = {key: value for key, value in message.items() if value is not None}
    if not isinstance(plain.get("role"), str):
        raise RequestError("every message needs a role.", param="messages")
    if isinstance(parts := plain.get("content"), list):
        texts = [_part_text(part) for part in parts]
        plain["content"] = [{"type": "text", "text": text} for text in texts] if reads_parts else "\n".join(texts)
    if isinstance(calls := plain.get("tool_calls"), list):
        plain["tool_calls"] = [_parsed_call(call) for call in calls]
    reasoning = next((plain[name] for name in _REASONING if name in plain), None)
    if reasoning is not None:   # newer templates read one name, older ones another
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _part_text(part: object) -> str:
    text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise RequestError(f"content parts of type {kind!r} are not supported: text only.", param="messages")
    return text


def _parsed_call(call: object) -> object:
    """OpenAI's clients send a call's arguments as a JSON string; nearly all templates want the object."""
    if not isinstance(call, Mapping):
        return call
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(arguments := function.get("arguments"), str):
        return call
    try:
        parsed = json.loads(arguments) if arguments else {}
    except ValueError as error:
        raise RequestError(f"arguments of a tool call are not JSON: {error}.", param="messages") from error
    return {**call, "function": {**function, "arguments": parsed}}


def _mark_end(message: dict[str, object]) -> None:
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _MARK
    elif isinstance(content, list) and content:
        message["content"] = [*content[:-1], {"type": "text", "text": content[-1]["text"] + _MARK}]
    else:
        raise RequestError("continue_final_message needs a last message with text.", param="continue_final_message")


def _cut_at_mark(text: str) -> str:
    at = text.rfind(_MARK.strip())
    if at < 0:
        raise RequestError(
            "continue_final_message: the chat template changes the last message, so it cannot be continued.",
            param="continue_final_message",
        )
    return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()
