"""The jinja2 template of a SPEC's prompt."""

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from fastrm.errors import ConfigError


class PromptTemplate:
    """A template of the user's turn.

    Args:
        text: of the template.
        names: that it may use beside `question`, for messages.

    Raises:
        ConfigError: for a text that is no template.
    """

    def __init__(self, text: str, names: tuple[str, ...]):
        self._names = names
        # In a sandbox: a SPEC may be somebody else's.
        environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        try:
            self._template = environment.from_string(text)
        except TemplateError as error:
            raise ConfigError(f"prompt: {error}") from None

    def fill(self, **values: str) -> str:
        """Return the user's turn with these values.

        Raises:
            ConfigError: for a template that wants another name, or fails.
        """
        try:
            return self._template.render(**values)
        except TemplateError as error:
            raise ConfigError(f"prompt: {error}; it has question, {' and '.join(self._names)}") from None
