"""The LM head of models that write, from a backbone's files."""

import torch
from torch import nn

from fastrm.errors import ConfigError
from fastrm.model.families import has_tied_embeddings
from fastrm.model.loading import LM_HEAD, Backbone, PickDtype, has_weights, open_backbone
from fastrm.model.weight_files import StoredTensor

# The elements that are compared at a time.
_PIECE = 2**22


def untie_other_lm_head(files: Backbone) -> None:
    """Set a config's tie_word_embeddings to false where the files hold another LM head: stock does not tie it then.

    Raises:
        ConfigError: if an adapter changes an LM head that the files do not hold: stock would change it and not the
            embeddings that it is tied to.
    """
    if files.left_out:
        raise ConfigError(
            f"model.path {files.place.given!r}: its adapter changes {files.left_out[0]}, which the base ties to its "
            "embeddings, and a critic or judge writes with it; give the base an LM head of its own "
            "(tie_word_embeddings: false), merge the adapter into that with PEFT's merge_and_unload, and name the "
            "merged model"
        )
    config = files.model.config
    if not has_tied_embeddings(config) or files.lm_head is None:
        return
    embeddings = files.model.get_input_embeddings().weight
    name = next(name for name, parameter in files.model.named_parameters() if parameter is embeddings)
    if not _are_equal(files.lm_head, files.tensors[name]):
        config.tie_word_embeddings = False


def untie_as_files(config, path: str) -> None:
    """Apply `untie_other_lm_head` to a config of model.path whose model is not opened, if its weights are on this disk.

    Raises:
        ConfigError, StorageError: as `open_backbone` and `untie_other_lm_head`.
    """
    if has_tied_embeddings(config) and has_weights(path):
        files = open_backbone(path)
        untie_other_lm_head(files)
        config.tie_word_embeddings = has_tied_embeddings(files.model.config)


def _are_equal(first: StoredTensor, second: StoredTensor) -> bool:
    """Compare two tensors in pieces, up to the first difference: most of those that differ do so at once."""
    if first.shape != second.shape:
        return False
    for start in range(0, first.numel, _PIECE):
        pieces = torch.empty(2, min(_PIECE, first.numel - start))
        first.read_into(pieces[0], start)
        second.read_into(pieces[1], start)
        if not torch.equal(*pieces):
            return False
    return True


def load_lm_head(
    head: nn.Linear, files: Backbone, pick_dtype: PickDtype, device: torch.device, *, reads: bool = True
) -> None:
    """Fill an LM head from the files, as `Backbone.load` fills the backbone.

    Raises:
        ConfigError: if the files hold none, or one of another shape.
    """
    wanted, found = head.weight.shape, None if files.lm_head is None else files.lm_head.shape
    if found is None or tuple(found) != wanted:
        got = "is not in the files" if found is None else f"has shape {list(found)}"
        raise ConfigError(
            f"model.path {files.place.given!r}: {LM_HEAD} {got}, wanted {list(wanted)}: a critic or judge writes "
            "with it, and a reward model has none; name the language model that it was made of"
        )
    dtype = pick_dtype(LM_HEAD, head.weight, files.dtype)
    filled = nn.Parameter(torch.empty(wanted, dtype=dtype, device=device), head.weight.requires_grad)
    if reads:
        files.lm_head.read_into(filled.detach().view(-1))
    head.weight = filled
