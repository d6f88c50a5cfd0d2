"""The LM head of models that write, from a backbone's files."""

import torch
from torch import nn

from fastrm.errors import ConfigError
from fastrm.model.families import has_tied_embeddings
from fastrm.model.loading import LM_HEAD, Backbone, PickDtype


def untie_other_lm_head(files: Backbone) -> None:
    """Set a config's tie_word_embeddings to false where the files hold another LM head: stock does not tie it then."""
    config = files.model.config
    if not has_tied_embeddings(config) or files.lm_head is None:
        return
    embeddings = files.model.get_input_embeddings().weight
    name = next(name for name, parameter in files.model.named_parameters() if parameter is embeddings)
    if not torch.equal(files.lm_head.read(), files.tensors[name].read()):
        config.tie_word_embeddings = False


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
