"""`system` and `history` columns, which LLaMA-Factory and ms-swift share."""

from fastrm.data.sources.conversation import Turn, text_turn
from fastrm.data.sources.values import bad_row


def with_system(row: dict, turns: list[Turn]) -> list[Turn]:
    """The turns after the row's `system` text, unless it is empty or they begin with their own."""
    if not row.get("system") or turns[0].role == "system":
        return turns
    return [text_turn("system", row["system"], "system"), *turns]


def history_turns(row: dict) -> list[Turn]:
    """The earlier turns of a row, from its list of [query, response] pairs.

    Raises:
        RecordError: BAD_ROW or BAD_TEXT.
    """
    history = row.get("history", [])
    if not isinstance(history, list):
        raise bad_row("history", history, "a list of [query, response] pairs")
    turns = []
    for i, exchange in enumerate(history):
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise bad_row(f"history[{i}]", exchange, "[query, response]")
        turns.append(text_turn("user", exchange[0], f"history[{i}][0]"))
        turns.append(text_turn("assistant", exchange[1], f"history[{i}][1]"))
    return turns
