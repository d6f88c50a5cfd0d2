"""The date for a chat template that reads the clock, as Llama 3.x's does ("Today Date: ...").

transformers gives it the day of the call, so that rewards would change over night. Here the day becomes a part of the
template: a macro in front of it replaces the clock. Whoever renders the exported template, be it stock transformers
or a server, gets the date that the model was trained with.
"""

import copy
import datetime
import json
import re

_PREFIX = re.compile(r"\{#- the clock stands at (\d{4}-\d\d-\d\d) -#\}.*\n")


def reads_clock(tokenizer) -> bool:
    """Return whether the tokenizer's chat template asks for the date."""
    return "strftime_now" in str(tokenizer.chat_template)


def today() -> datetime.date:
    """Return the present date on this machine."""
    return datetime.date.today()


def at_date(tokenizer, date: datetime.date | None):
    """Return the tokenizer with its template's clock stopped, and the date; itself and None without a clock.

    Args:
        date: default: the date at which it is already stopped, else today.
    """
    if not reads_clock(tokenizer):
        return tokenizer, None
    template = tokenizer.chat_template
    date = date or _date_of(template) or today()
    tokenizer = copy.copy(tokenizer)
    if isinstance(template, dict):
        tokenizer.chat_template = {name: _at_date(text, date) for name, text in template.items()}
    else:
        tokenizer.chat_template = _at_date(template, date)
    return tokenizer, date


def _date_of(template: str | dict[str, str]) -> datetime.date | None:
    found = _PREFIX.search(template if isinstance(template, str) else "\n".join(template.values()))
    return found and datetime.date.fromisoformat(found[1])


def _at_date(template: str, date: datetime.date) -> str:
    """Return a template whose `strftime_now` knows every format that the template holds, at midnight of the date.

    The line in front writes nothing: templates are rendered with `trim_blocks`, which drops its line break.
    """
    import jinja2

    template = _PREFIX.sub("", template, count=1)
    midnight = datetime.datetime.combine(date, datetime.time())
    texts = (value for _, kind, value in jinja2.Environment().lex(template) if kind == "string")
    dates = {text[1:-1]: midnight.strftime(text[1:-1]) for text in texts if "%" in text}
    unknown = "raise_exception('the date is fixed, and this format of it was not known: ' + format)"
    return (
        f"{{#- the clock stands at {date} -#}}{{%- macro strftime_now(format) -%}}"
        f"{{{{ {json.dumps(dates)}[format] if format in {json.dumps(list(dates))} else {unknown} }}}}"
        f"{{%- endmacro %}}\n{template}"
    )
