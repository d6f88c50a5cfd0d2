"""Model folders of critics and judges: config.json says what they are, and with which SPEC they were trained.

    "fastrm": {..., "paradigm": {"kind": "critic", "spec": {...}}}

A critic's reward stands behind a critique that it writes first, and a judge has none: what scores responses refuses
both by name, since a number that is read without the critique is another one and looks like a reward.
"""

from pathlib import Path

from fastrm.errors import ConfigError
from fastrm.model.places import locate

WRITERS = ("critic", "judge")


def stored_paradigm(path: str | Path) -> dict | None:
    """Return {"kind": critic or judge, "spec": the SPEC} of a model folder or hub id; None for any other model.

    Raises:
        ConfigError: as `locate`, without config.json, or for a section that is malformed.
    """
    return paradigm_in(str(path), locate(path).read_config().get("fastrm"))


def is_writer(path: str) -> bool:
    """Return whether a folder holds a critic or a judge.

    Raises:
        ConfigError: as `stored_paradigm`.
    """
    return Path(path).is_dir() and stored_paradigm(path) is not None


def paradigm_in(where: str, section: object) -> dict | None:
    """Return what config.json's `fastrm` section says of a critic or a judge; None where it says nothing.

    Raises:
        ConfigError: if it is malformed.
    """
    found = section.get("paradigm") if isinstance(section, dict) else None
    if found is None:
        return None
    if not (isinstance(found, dict) and found.get("kind") in WRITERS and isinstance(found.get("spec"), dict)):
        raise ConfigError(
            f'{where}/config.json: no valid "paradigm" in its `fastrm` section; wanted {{"kind": "critic" or "judge", '
            '"spec": {...}}; copy the whole folder again'
        )
    return found


def check_gives_rewards(where: str, section: object, *, behind_critique: bool = False) -> None:
    """Refuse a critic or a judge where rewards of responses are wanted.

    Args:
        section: `fastrm` of config.json.
        behind_critique: the conversations end with a critique, so that a critic's reward is what it was trained for.

    Raises:
        ConfigError: naming what to do in place of it.
    """
    found = paradigm_in(where, section)
    if found is None or (behind_critique and found["kind"] == "critic"):
        return
    behind = "its reward is read behind a critique that it writes first"
    why = behind if found["kind"] == "critic" else "it writes a verdict, and has no reward"
    raise ConfigError(
        f"{where}: is a {found['kind']}, not a reward model: {why}; fastrm eval {where} DATA evaluates it, and "
        "AutoModelForCausalLM or AutoModelForImageTextToText of transformers lets it write (docs/judges.md)"
    )
