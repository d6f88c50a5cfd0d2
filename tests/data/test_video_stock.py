"""Videos against the stock video processor and the stock combined processor, which need torchvision.

torchvision has no build for CPU torch, so these tests are for machines with a GPU build; they compute on the CPU.
What they compare with elsewhere is `stock.video_patches`, which the first of them ties to the class itself.
"""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from fastrm.data.record import Message, Response
from fastrm.errors import RecordError
from fastrm.limits import MediaLimits
from tests.helpers import stock
from tests.helpers.support import make_image, make_model
from tests.helpers.video_files import decode_all, make_video

pytest.importorskip("torchvision")


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def encoder(request):
    return make_model(request.param).encoder


@pytest.fixture(scope="module")
def processor(encoder, tmp_path_factory):
    """The stock class, from what an export writes."""
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    folder = tmp_path_factory.mktemp("model")
    encoder.vision.save(folder)
    kinds = {kind.__name__: kind for kind in (Qwen2VLVideoProcessor, Qwen3VLVideoProcessor)}
    return kinds[encoder.vision.video_class].from_pretrained(folder)


def test_an_export_says_what_the_stock_class_wants(encoder, processor):
    size = {"shortest_edge": encoder.vision.video.min_pixels, "longest_edge": encoder.vision.video.max_pixels}
    assert {name: processor.size[name] for name in size} == size
    assert processor.num_frames == encoder.vision.video.num_frames
    for name in ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std"):
        assert getattr(processor, name) == getattr(encoder.vision.processor, name), name


@pytest.mark.parametrize("seed", range(12))
def test_pixel_values_equal_those_of_the_stock_video_processor(seed, encoder, processor):
    rng = np.random.default_rng(seed)
    num_frames, width, height = int(rng.integers(1, 12)), *(int(2 * side) for side in rng.integers(10, 200, 2))
    ref = make_video(num_frames, width, height, seed)
    frames = decode_all(ref.data)
    if num_frames == 1 and encoder.vision.video_class == "Qwen3VLVideoProcessor":
        with pytest.raises(ValueError, match="must be larger than temporal_factor"):
            processor(videos=[np.stack(frames)], do_sample_frames=False, return_tensors="pt")
        with pytest.raises(RecordError, match="has 1 frames"):
            encoder.measure(ref)
        return
    sampled = np.stack([frames[number] for number in encoder.vision.pick_frames(num_frames, min(num_frames, 6))])
    expected = processor(videos=[sampled], do_sample_frames=False, return_tensors="pt")

    patches, grid = encoder.vision.cut(ref, encoder.measure(ref), MediaLimits())
    assert [list(grid)] == expected["video_grid_thw"].tolist()
    ours = encoder.vision.patch_format.normalize(torch.from_numpy(patches))
    assert torch.equal(ours, expected["pixel_values_videos"])
    oracle, _ = stock.video_patches(encoder, torch.from_numpy(sampled).permute(0, 3, 1, 2))
    assert torch.equal(oracle, expected["pixel_values_videos"])


def test_noise_is_resized_as_by_the_stock_video_processor(encoder, processor):
    """Extreme bytes, where rounding and clipping would differ first, up and down in size."""
    for seed, (width, height) in enumerate([(17, 33), (64, 48), (301, 200), (1280, 720)]):
        frames = np.random.default_rng(seed).choice(np.array([0, 255], dtype=np.uint8), (2, height, width, 3))
        expected = processor(videos=[frames], do_sample_frames=False, return_tensors="pt")["pixel_values_videos"]
        oracle, _ = stock.video_patches(encoder, torch.from_numpy(frames).permute(0, 3, 1, 2))
        assert torch.equal(oracle, expected)


def test_the_same_frames_are_sampled(encoder, processor):
    from transformers.video_utils import VideoMetadata

    for total in (*range(6, 300), 1000, 7777, 100_001):
        expected = processor.sample_frames(VideoMetadata(total_num_frames=total, fps=10), num_frames=6)
        assert encoder.vision.pick_frames(total, 6) == expected.tolist(), total


def test_a_conversation_equals_that_of_the_stock_combined_processor(encoder, processor):
    from transformers import Qwen2_5_VLProcessor, Qwen3VLProcessor

    videos, image = [make_video(23, 90, 70), make_video(6, 60, 120, 1)], make_image(60, 80)
    question = Message("user", (videos[0], "and", image, "and", videos[1], "What happens?"))
    response = Response((question, Message("assistant", ("It moves.",))))
    kind = Qwen3VLProcessor if encoder.vision.video_class == "Qwen3VLVideoProcessor" else Qwen2_5_VLProcessor
    combined = kind(encoder.vision.processor, encoder.tokenizer, processor)
    text = encoder.tokenizer.apply_chat_template(
        [
            {"role": m.role, "content": [{"type": "text", "text": p} if isinstance(p, str) else {"type": p.noun}
                                         for p in m.parts]} for m in response.messages
        ], tokenize=False,
    )  # fmt: skip
    decoded = [stock.read_video_pyav(io.BytesIO(ref.data), stock.sample_indices(encoder)) for ref in videos]
    expected = combined(
        text=[text],
        images=[Image.open(io.BytesIO(image.data))],
        videos=[frames for frames, _ in decoded],
        video_metadata=[metadata for _, metadata in decoded],
        do_sample_frames=False,
        return_tensors="pt",
    )
    ours = stock.stock_inputs(encoder, response)
    assert encoder.encode(response).tokens.tolist() == expected["input_ids"][0].tolist()
    for name in ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "mm_token_type_ids"):
        assert torch.equal(ours[name], expected[name]), name
    if kind is Qwen2_5_VLProcessor:
        assert torch.equal(ours["second_per_grid_ts"], torch.as_tensor(expected["second_per_grid_ts"]))
