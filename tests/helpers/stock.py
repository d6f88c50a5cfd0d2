"""The oracle: stock transformers, one response at a time, with nothing of fastrm's.

Template, tokeniser, image processor and positions are the stock ones, called as their documentation
says; the reward is the stock head module on the last token's hidden state, or on the mean of all.
"""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as smart_resize_of_all
from transformers.video_utils import read_video_pyav

from fastrm.data.record import ImageRef, MediaRef, VideoRef

# Without this term the loss would not see the head's last bias, and its gradient would prove nothing.
CENTER = 0.1


def stock_inputs(encoder, response) -> dict:
    """Keyword arguments of the stock model for one conversation (batch of one)."""
    messages = [{"role": message.role, "content": _content(encoder, message)} for message in response.messages]
    text = encoder.tokenizer.apply_chat_template(messages, tokenize=False)
    inputs = {}
    images = [Image.open(io.BytesIO(ref.data)) for ref in response.media if isinstance(ref, ImageRef)]
    videos = [ref for ref in response.media if isinstance(ref, VideoRef)]
    if images and encoder.vision.opening:
        inputs, text = _stock_tiles(encoder, images, text)
    elif images:
        inputs |= encoder.vision.processor(images=images, return_tensors="pt")
        text = _expand(text, "<|image_pad|>", inputs["image_grid_thw"], encoder)
    if videos:
        inputs |= stock_videos(encoder, videos)
        if encoder.vision.video_class == "Qwen3VLVideoProcessor":
            text = _with_times(text, videos, inputs["video_grid_thw"], encoder)
        else:
            text = _expand(text, "<|video_pad|>", inputs["video_grid_thw"], encoder)
    inputs["input_ids"] = encoder.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if encoder.vision is not None and not encoder.vision.opening:
        ids, pads = inputs["input_ids"], encoder.vision.placeholders
        inputs["mm_token_type_ids"] = (ids == pads[ImageRef]).int() + 2 * (ids == pads[VideoRef]).int()
    return inputs


def _content(encoder, message) -> str | list[dict]:
    """A message's content as its model's template takes it: those of text models take a string."""
    if encoder.vision is None:
        return message.text
    return [
        {"type": part.noun} if isinstance(part, MediaRef) else {"type": "text", "text": part} for part in message.parts
    ]


def _stock_tiles(encoder, images, text: str) -> tuple[dict, str]:
    """What the stock InternVL processor does with images and their placeholders; its class needs torchvision."""
    processor = encoder.vision.processor
    found = processor(images=images, crop_to_patches=True, return_tensors="pt")
    tokens = processor.size["height"] // 14 // 2
    for num_tiles in found["num_patches"]:
        tiles = "<placeholder>" * tokens**2 * int(num_tiles)
        text = text.replace("<IMG_CONTEXT>", f"<img>{tiles}</img>", 1)
    return {"pixel_values": found["pixel_values"]}, text.replace("<placeholder>", "<IMG_CONTEXT>")


def _expand(text: str, pad: str, grids: torch.Tensor, encoder) -> str:
    """What the stock processor does with placeholders: one token per merged patch."""
    for grid in grids:
        count = int(grid.prod()) // encoder.vision.processor.merge_size**2
        text = text.replace(pad, "<|placeholder|>" * count, 1)
    return text.replace("<|placeholder|>", pad)


def _with_times(text: str, refs, grids: torch.Tensor, encoder) -> str:
    """What `Qwen3VLProcessor.replace_video_token` does with placeholders; its class needs torchvision."""
    for ref, (frames, rows, columns) in zip(refs, grids.tolist(), strict=True):
        _, metadata = read_video_pyav(io.BytesIO(ref.data), sample_indices(encoder))
        times = Qwen3VLProcessor._calculate_timestamps(None, metadata.frames_indices, metadata.fps, 2)
        assert len(times) == frames
        pads = "<|placeholder|>" * (rows * columns // encoder.vision.processor.merge_size**2)
        planes = "".join(f"<{time:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for time in times)
        text = text.replace("<|video_pad|>", planes, 1)
    return text.replace("<|placeholder|>", "<|video_pad|>")


def stock_videos(encoder, refs) -> dict:
    """What the stock video processor gives for mp4 files in memory.

    Its class does not load without torchvision. These are its steps, each by the call that it ends in;
    tests/data/test_video_stock.py compares them with the class itself where that loads.
    """
    values, grids, seconds = [], [], []
    for ref in refs:
        video, metadata = read_video_pyav(io.BytesIO(ref.data), sample_indices(encoder))
        patches, grid = video_patches(encoder, torch.from_numpy(video).permute(0, 3, 1, 2))
        values.append(patches)
        grids.append(grid)
        seconds.append(encoder.vision.processor.temporal_patch_size / metadata.sampled_fps)
    inputs = {"pixel_values_videos": torch.cat(values), "video_grid_thw": torch.tensor(grids)}
    if encoder.vision.tokens_per_second is not None:
        inputs["second_per_grid_ts"] = torch.tensor(seconds)
    return inputs


def sample_indices(encoder):
    """`sample_frames` of the stock video processor for a number of frames; of a shorter video all, where it refuses."""
    num_frames, spread = encoder.vision.video.num_frames, encoder.vision.video_class == "Qwen3VLVideoProcessor"

    def indices(metadata, **_):
        total = metadata.total_num_frames
        if total <= num_frames:
            return list(range(total))
        if spread:
            return np.linspace(0, total - 1, num_frames).round().astype(int).tolist()
        return torch.arange(0, total, total / num_frames).int().tolist()

    return indices


def video_patches(encoder, frames: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """`_preprocess` of the stock video processor for frames (T, 3, H, W) uint8: patches and grid."""
    processor, video = encoder.vision.processor, encoder.vision.video
    side, merge, depth = processor.patch_size, processor.merge_size, processor.temporal_patch_size
    limits = {"min_pixels": video.min_pixels, "max_pixels": video.max_pixels}
    if encoder.vision.video_class == "Qwen3VLVideoProcessor":
        height, width = smart_resize_of_all(
            len(frames), *frames.shape[-2:], depth, side * merge, **limits
        )
    else:
        height, width = smart_resize(*frames.shape[-2:], side * merge, **limits)
    frames = torch.nn.functional.interpolate(frames, (height, width), mode="bicubic", antialias=True)
    factor = 1.0 / processor.rescale_factor
    mean, std = (torch.tensor(value).view(3, 1, 1) * factor for value in (processor.image_mean, processor.image_std))
    frames = (frames.float() - mean) / std
    frames = torch.cat([frames, frames[-1:].expand(-len(frames) % depth, -1, -1, -1)])
    grid = len(frames) // depth, height // side, width // side
    patches = frames.view(
        grid[0], depth, 3, grid[1] // merge, merge, side, grid[2] // merge, merge, side
    ).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # fmt: skip
    return patches.reshape(grid[0] * grid[1] * grid[2], -1), grid


def set_stock_attention(network) -> None:
    names = {"": "eager", "text_config": "eager", "vision_config": "eager"} if network.is_vision else "eager"
    network.model.set_attn_implementation(names)


def stock_rewards(network, records) -> torch.Tensor:
    """Rewards (R,) of all responses of all records."""
    set_stock_attention(network)
    rewards = []
    for record in records:
        for response in record.responses:
            inputs = stock_inputs(network.encoder, response)
            for name in {"pixel_values", "pixel_values_videos"} & inputs.keys():
                inputs[name] = inputs[name].to(network.model.dtype)
            hidden = network.model(**inputs, use_cache=False).last_hidden_state
            state = hidden[0].mean(0) if network.pooling == "mean" else hidden[0, -1]
            rewards.append(network.score(state).squeeze(-1))
    return torch.stack(rewards)


def stock_loss(network, records) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over all preferences of -log sigmoid(r_w - r_l) + CENTER (r_w + r_l)^2, and the rewards (R,)."""
    rewards = stock_rewards(network, records)
    terms, first = [], 0
    for record in records:
        for p in record.preferences:
            winner, loser = rewards[first + p.winner], rewards[first + p.loser]
            terms.append(-torch.nn.functional.logsigmoid(winner - loser) + CENTER * (winner + loser) ** 2)
        first += len(record.responses)
    return torch.stack(terms).mean(), rewards


def save_stock_checkpoint(folder: Path, network, dtype=torch.bfloat16, shard: str | int = "5GB") -> Path:
    """Write a network's backbone as transformers does, with an LM head, and its tokenizer; returns the folder."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if network.is_vision else AutoModelForCausalLM
    full = kind.from_config(network.model.config, dtype=torch.float32)
    (full.model if hasattr(full, "model") else full).load_state_dict(network.model.state_dict())
    full.to(dtype).save_pretrained(folder, max_shard_size=shard)
    network.encoder.tokenizer.save_pretrained(folder)
    if network.encoder.vision is not None:
        network.encoder.vision.save(folder)
    return folder
