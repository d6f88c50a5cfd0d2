"""`RewardModel`: a trained reward model as other programs use it."""

from collections.abc import Sequence
from pathlib import Path

import torch

from fastrm.model.export import load_model
from fastrm.model.network import RewardNetwork, pick_device


class RewardModel:
    """Scores responses with an exported reward model.

        model = fastrm.RewardModel.from_pretrained("runs/quickstart/model")
        model.score([{"prompt": "Which digit?", "images": ["7.png"], "responses": ["seven", "two"]}])

    Attributes:
        network: the weights, and the tokeniser and image processor that belong to them.
    """

    def __init__(self, network: RewardNetwork):
        self.network = network.eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        attention: str = "auto",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> "RewardModel":
        """Load the `model/` folder of a run, or any folder of the same layout.

        Args:
            device: auto (cuda if there is one), cpu, cuda.
            dtype: auto (bf16 on cuda, fp32 on cpu), fp32, bf16: of weights and computation.
            attention: auto, sdpa, flash.
            min_pixels, max_pixels: image size limits; default: those of the training run.

        Raises:
            ConfigError: if the folder is not a reward model, or the device cannot do what is asked.
            StorageError: if its weights are damaged or incomplete.
        """
        target = pick_device(device)
        if dtype == "auto":
            dtype = "bf16" if target.type == "cuda" else "fp32"
        torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        network = load_model(Path(path), min_pixels, max_pixels).to(device=target, dtype=torch_dtype)
        network.use_attention(attention, torch_dtype)
        return cls(network)

    def score(self, groups: Sequence[dict], *, tokens_per_pack: int = 16384) -> list[list[float]]:
        """Rewards of every response, in the order of the groups.

        All responses of a group share one pass over its prompt and images.

        Args:
            groups: {"prompt": str or messages, "images": [path | bytes | PIL image], "responses":
                [str, ...]}; images may be left out.
            tokens_per_pack: token budget of one forward pass; the largest group must fit.

        Raises:
            DataError: for a group that cannot be scored, naming it and the reason.
        """
        from fastrm.evaluate.scoring import score_groups

        return score_groups(self.network, groups, tokens_per_pack)
