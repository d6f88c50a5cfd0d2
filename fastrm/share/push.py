"""`fastrm push`: the files of a trained model and its card, in one commit of a repository of the hub.

What is sent is named by a list of kinds of files, so that nothing of a run goes out by accident: neither checkpoints
with their optimizer states, nor data, nor the quarantine, which quotes it.
"""

from pathlib import Path

from fastrm.errors import ConfigError, ServerError
from fastrm.hub_errors import explain
from fastrm.model.places import ADAPTER_CONFIG, checked_path, locate, read_json
from fastrm.model.weight_files import CONFIG
from fastrm.share.card import make_card
from fastrm.tables import Table
from fastrm.ui import make_console, message, print_table

CARD = "README.md"
_SENT = (".json", ".safetensors", ".jinja", ".txt", ".model", CARD)


def push(
    run: str | Path, repo: str, *, public: bool = False, licence: str | None = None, dry_run: bool = False
) -> None:
    """Send a run's model to a repository of the hub, which is made, private unless `public` says otherwise.

    A README.md in the model's folder is sent as the card; else one is made of the run's files.

    Args:
        run: the folder of a run, or of a model that fastrm exported.
        repo: owner/name.
        licence: for the card, an identifier that the hub knows.
        dry_run: print what would be sent, and send nothing.

    Raises:
        ConfigError: for a folder without a model, or a name that the hub cannot have, or a repository that is public
            when it was not to be.
        ServerError: if the hub cannot be reached, or refuses.
    """
    _check_name(repo)
    model = _model_folder(Path(checked_path(run)))
    files = sorted(file for file in model.iterdir() if file.is_file() and file.name.endswith(_SENT))
    whole = model.parent if model.name == "model" and (model.parent / "config.yaml").is_file() else None
    content: dict[str, Path | bytes] = {file.name: file for file in files}
    if CARD not in content:
        content[CARD] = make_card(repo, model, whole, licence).encode()
    console, visibility = make_console(), "public" if public else "private"
    table = Table("file", "bytes", title=f"{repo} ({visibility})")
    sizes = {name: len(value) if isinstance(value, bytes) else value.stat().st_size for name, value in content.items()}
    for name, size in sizes.items():
        table.add_row(name, f"{size:,}")
    table.add_row("all", f"{sum(sizes.values()):,}")
    print_table(console, table)
    if left := sorted(file.name for file in model.iterdir() if file.name not in content):
        message(console, f"not sent: {', '.join(left)}")
    if dry_run:
        card = content[CARD]
        message(console, f"nothing was sent; the card, {CARD}, would be:\n")
        console.out(card.decode() if isinstance(card, bytes) else card.read_text(encoding="utf-8"), highlight=False)
        return
    message(console, f"sent: {_send(repo, content, public)}")


def _check_name(repo: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"{repo!r}: the hub has no such names: {str(error).splitlines()[0]}") from None
    if repo.count("/") != 1:
        raise ConfigError(f"{repo!r}: wanted OWNER/NAME, the owner being your user name or an organisation")


def _model_folder(run: Path) -> Path:
    """Return the folder of the model of a run, or the folder itself.

    Raises:
        ConfigError: for a hub id, a run without a model, a checkpoint, or a model that fastrm did not export.
    """
    if not run.is_dir():
        raise ConfigError(f"{run}: no such folder; wanted that of a run, or of a model that fastrm exported")
    model = run / "model" if (run / "model" / ADAPTER_CONFIG).is_file() else run
    if (model / ADAPTER_CONFIG).is_file():
        base = str(read_json(str(model), ADAPTER_CONFIG).get("base_model_name_or_path") or "")
        if Path(base).is_absolute() or (model / base).exists() or Path(base).exists():
            raise ConfigError(
                f"{model}: its base model, {base}, is a folder that nobody else has; push a whole model, of fastrm "
                f"export {run} --out FOLDER, or set base_model_name_or_path in {ADAPTER_CONFIG} to its hub id"
            )
        return model
    model = Path(locate(run).base)
    file = model / CONFIG
    if not file.is_file() or '"fastrm"' not in file.read_text(encoding="utf-8"):
        raise ConfigError(f"{model}: is no reward model of fastrm; write one with fastrm export {run} --out FOLDER")
    return model


def _send(repo: str, content: dict[str, Path | bytes], public: bool) -> str:
    """Send the files in one commit; return its address."""
    from huggingface_hub import CommitOperationAdd, HfApi

    try:
        api = HfApi()
        api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.model_info(repo).private:
            raise ConfigError(f"{repo}: exists and is public; add --public to send the model where everybody reads it")
        operations = [CommitOperationAdd(name, value) for name, value in content.items()]
        return str(api.create_commit(repo, operations, commit_message="Reward model by fastrm").commit_url)
    except ConfigError:
        raise
    except Exception as error:  # the hub's client raises many types
        raise ServerError(f"{repo}: nothing was sent: {explain(repo, error)}") from error
