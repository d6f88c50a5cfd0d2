"""The plain pairwise trainer of the benchmark: stock model and attention, two padded rows a preference."""

import dataclasses
import importlib

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface

from bench.training.workloads import IMAGE_PAD
from fastrm.config import Config
from fastrm.data.packing import EncodedGroup, Pack, Pixels
from fastrm.data.record import ImageRef
from fastrm.model.network import RewardNetwork
from fastrm.train.engine import LocalEngine
from fastrm_kernels.tree_attention.varlen import varlen_options

PAD = 0
# transformers looks for "flash" in the name: the tower then hands over all its windows at once, as it does to
# the flash-attn package, and does not loop over them in Python.
VARLEN = "flash_torch_varlen"


@dataclasses.dataclass
class PlainBatch(Pack):
    """A pack's groups as a pairwise trainer collates them: two rows a preference, right-padded.

    Attributes:
        padded_ids: (2 E, N), all winners before all losers.
        last: (2 E,) index of each row's last token.
    """

    padded_ids: torch.Tensor | None = None
    last: torch.Tensor | None = None


class PlainEngine(LocalEngine):
    """An engine of the stock model and its attention: each conversation is a padded row with its own image."""

    def loss_and_rewards(self, pack: PlainBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute head and loss apart, as other trainers compute them."""
        pack = pack.to(self.network.device)
        rewards = self.rewards(pack)
        return self.loss(rewards, pack), rewards

    def rewards(self, pack: PlainBatch) -> torch.Tensor:
        """Return rewards (2 E,), all winners before all losers."""
        network, half = self.network, self.config.precision.dtype == "bf16"
        images = {}
        if pack.media_grids:
            images = {
                "mm_token_type_ids": (pack.padded_ids == IMAGE_PAD).int(),
                "pixel_values": pack.pixel_values,
                "image_grid_thw": torch.tensor(pack.media_grids, device=network.device),
            }
        with torch.autocast(network.device.type, dtype=torch.bfloat16, enabled=half):
            hidden = network.model(
                input_ids=pack.padded_ids,
                attention_mask=(torch.arange(pack.padded_ids.shape[1], device=network.device) <= pack.last[:, None]),
                use_cache=False,
                **images,
            ).last_hidden_state
            states = hidden[torch.arange(len(pack.last), device=network.device), pack.last]
            return network.score(states).squeeze(-1).float()


def use_stock(network: RewardNetwork, config: Config) -> RewardNetwork:
    """Set up the stock model as peers do: SDPA, FlashAttention for the tower's windows, checkpointing."""
    # The gate's float32 run cannot use varlen attention, which is bf16 only.
    half = config.precision.dtype == "bf16"
    vision = VARLEN if network.device.type == "cuda" and half else "sdpa"
    AttentionInterface.register(VARLEN, varlen_attention)
    network.model.set_attn_implementation({"": "sdpa", "text_config": "sdpa", "vision_config": vision})
    if config.model.activation_checkpointing != "none":
        # transformers renamed the method between the versions that we support.
        model = network.model
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        model.disable_input_require_grads()
    return network


def varlen_attention(module, query, key, value, attention_mask, *, scaling, cu_seq_lens_q, max_length_q, **_):
    """Call torch's varlen FlashAttention as transformers calls attention: (1, H, N, K) -> (1, N, H, K), and None."""
    varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    rows = [states[0].transpose(0, 1).contiguous() for states in (query, key, value)]
    heads = rows[0].shape[1]
    bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    return varlen_attn(*rows, *bounds, **varlen_options(heads, heads, scaling, causal=False))[None], None


def pairwise_rows(groups: list[EncodedGroup], pixels: Pixels) -> tuple[list[EncodedGroup], Pixels]:
    """Return the groups of a pairwise trainer: one for each preference, with two responses, each with an image."""
    rows, copies = [], {}
    for group in groups:
        for preference in group.preferences:
            pair = []
            for number in (preference.winner, preference.loser):
                response = group.responses[number]
                spans = []
                for span in response.media:
                    ref = ImageRef(data=len(copies).to_bytes(4, "big"))
                    copies[ref.key] = pixels[span.ref.key]
                    spans.append(dataclasses.replace(span, ref=ref))
                pair.append(dataclasses.replace(response, media=tuple(spans)))
            edge = dataclasses.replace(preference, winner=0, loser=1)
            rows.append(dataclasses.replace(group, responses=tuple(pair), preferences=(edge,)))
    return rows, copies


def collate(pack: Pack, groups: list[EncodedGroup]) -> PlainBatch:
    """Return the padded batch of pairs, with the patches of a pack of the same groups."""
    responses = [group.responses[number] for number in (0, 1) for group in groups]
    lengths = np.array([len(response.tokens) for response in responses])
    tokens = [torch.from_numpy(response.tokens) for response in responses]
    fields = {field.name: getattr(pack, field.name) for field in dataclasses.fields(pack)}
    if pack.media_grids:
        # Images in the order of the rows: winners first.
        order = [number for half in (0, 1) for number in range(half, len(responses), 2)]
        counts = [rows * columns * frames for frames, rows, columns in pack.media_grids]
        patches = pack.patches.split(counts)
        fields["patches"] = torch.cat([patches[number] for number in order])
        fields["media_grids"] = [pack.media_grids[number] for number in order]
    num_pairs = len(groups)
    fields["edges"] = torch.stack([torch.arange(num_pairs), torch.arange(num_pairs) + num_pairs], 1)
    return PlainBatch(
        **fields,
        padded_ids=nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=PAD),
        last=torch.from_numpy(lengths - 1),
    )
