"""Settings of processors are those that the stock classes read from the same files, or an error names file and key."""

import json

import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from fastrm.data.media.videos import VideoSettings
from fastrm.errors import ConfigError
from fastrm.evaluate.reward_model import RewardModel
from fastrm.model.export import load_model, save_model
from tests.helpers.support import make_image, make_model, make_record

EDGES = {"shortest_edge": 3136, "longest_edge": 50176}
PIXELS = {"min_pixels": 6272, "max_pixels": 100352}
# Settings of an image processor: as people's files have them.
VARIANTS = {
    "edges": {"size": EDGES},
    "pixels": PIXELS,
    "edges and pixels beside": {"size": EDGES, **PIXELS},
    "one limit beside": {"size": EDGES, "max_pixels": 25088},
    "only one limit": {"min_pixels": 6272},
    "all four in size, with pixels beside": {"size": {**EDGES, **PIXELS}, **PIXELS},
    "null limits beside": {"size": EDGES, "min_pixels": None, "max_pixels": None},
    "null size": {"size": None, **PIXELS},
    "nothing": {},
    "another normalisation": {"size": EDGES, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
}
READ = ("do_resize", "resample", "do_rescale", "rescale_factor", "do_normalize", "patch_size", "merge_size",
        "temporal_patch_size")  # fmt: skip
NUMBERS = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}


@pytest.fixture
def folder(tmp_path):
    save_model(make_model("qwen2_5_vl"), tmp_path)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (tmp_path / name).unlink()
    return tmp_path


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content))


def vision_of(folder):
    return load_model(folder).encoder.vision


@pytest.mark.parametrize("place", ["a file of its own", "nested", "nested beside another file"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_images_are_read_as_the_stock_processor_reads_the_folder(variant, place, folder, monkeypatch):
    settings = {"image_processor_type": "Qwen2VLImageProcessor", **NUMBERS, **VARIANTS[variant]}
    if place == "a file of its own":
        write(folder, "preprocessor_config.json", settings)
        write(folder, "processor_config.json", {"processor_class": "Qwen2_5_VLProcessor"})
    else:
        write(folder, "processor_config.json", {"image_processor": settings})
    if place == "nested beside another file":
        write(folder, "preprocessor_config.json", {"size": {"shortest_edge": 784, "longest_edge": 1568}})
    vision = vision_of(folder)
    # transformers 5.17 writes limits of one file into the class's default.
    monkeypatch.setattr(Qwen2VLImageProcessorPil, "size", dict(Qwen2VLImageProcessorPil.size))
    stock = Qwen2VLImageProcessorPil.from_pretrained(folder)
    assert vision.processor.size == {name: stock.size[name] for name in ("shortest_edge", "longest_edge")}
    assert all(getattr(vision.processor, name) == getattr(stock, name) for name in READ)
    assert list(vision.processor.image_mean) == list(stock.image_mean)
    assert list(vision.processor.image_std) == list(stock.image_std)
    # An image that both limits could change: the grid is the stock one.
    record = make_record(1, images=(make_image(300, 500),))
    network = load_model(folder)
    stock_grid = stock(images=[make_pil(record)], return_tensors="pt")["image_grid_thw"][0].tolist()
    size = network.encoder.encode(record.responses[0]).media[0].size
    assert [size.frames, size.height * 2, size.width * 2] == stock_grid


def make_pil(record):
    import io

    from PIL import Image

    return Image.open(io.BytesIO(record.responses[0].media[0].data))


def test_limits_of_one_model_are_not_the_default_of_the_next(folder):
    default = dict(Qwen2VLImageProcessorPil.size)
    write(folder, "preprocessor_config.json", {**NUMBERS, **PIXELS})
    assert vision_of(folder).processor.size["longest_edge"] == PIXELS["max_pixels"] != default["longest_edge"]
    write(folder, "preprocessor_config.json", NUMBERS)
    assert vision_of(folder).processor.size == default


BROKEN = {
    "all four in size": ({"size": {**EDGES, **PIXELS}}, r"size .*refused by transformers' Qwen2VLImageProcessorPil"),
    "pixels in size": ({"size": PIXELS}, r"size is \{.*\}, wanted shortest_edge in it, or min_pixels beside it"),
    "one edge": ({"size": {"shortest_edge": 3136}}, r"size is .*, wanted longest_edge in it, or max_pixels beside it"),
    "a side": ({"size": 448}, r"size is 448, wanted longest_edge"),
    "a word": ({"size": {"shortest_edge": "small", "longest_edge": 3136}}, r"size is .*, wanted shortest_edge"),
    "another model": (
        {"size": EDGES, "image_processor_type": "CLIPImageProcessor"},
        r"image_processor_type is 'CLIPImageProcessor', wanted Qwen2VLImageProcessor",
    ),
    "other patches": ({"size": EDGES, "patch_size": 16}, r"patch_size is 16, but patch_size of vision_config in"),
}


@pytest.mark.parametrize("nested", [False, True], ids=["a file of its own", "nested"])
@pytest.mark.parametrize("case", BROKEN)
def test_what_the_stock_processor_cannot_use_is_refused_by_file_and_key(case, nested, folder):
    settings, message = BROKEN[case]
    settings = {**NUMBERS, **settings}
    name, content = ("processor_config.json", {"image_processor": settings}) if nested else (
        "preprocessor_config.json", settings
    )  # fmt: skip
    write(folder, name, content)
    with pytest.raises(ConfigError, match=rf"{name}: {'image_processor.' if nested else ''}{message}"):
        RewardModel.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl"])
def test_a_folder_without_settings_is_refused_by_name(family, tmp_path):
    save_model(make_model(family), tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "video_preprocessor_config.json").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=r"has no preprocessor_config.json and no processor_config.json with the key"):
        RewardModel.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read as JSON"), ("[1]", "holds list, wanted an object"),
     ('{"image_processor": 3}', "image_processor is 3, wanted an object")],
)  # fmt: skip
def test_a_damaged_file_is_named(content, message, folder):
    (folder / "processor_config.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"processor_config.json: {message}"):
        load_model(folder)


def test_tiles_are_read_from_a_nested_section_and_a_size_without_sides_is_refused(tmp_path):
    save_model(make_model("internvl"), tmp_path)
    own = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    write(tmp_path, "processor_config.json", {"image_processor": {**own, "max_patches": 3}})
    assert vision_of(tmp_path).processor.max_patches == 3
    write(tmp_path, "processor_config.json", {"image_processor": {**own, "size": {"shortest_edge": 56}}})
    with pytest.raises(ConfigError, match=r"image_processor.size is .*, wanted the height and width of a tile"):
        load_model(tmp_path)


class TestVideos:
    """What the stock video processor's class would take from the same files; it needs torchvision."""

    @pytest.fixture
    def folder(self, folder):
        write(folder, "preprocessor_config.json", {**NUMBERS, "size": EDGES})
        return folder

    def test_a_nested_section_is_read(self, folder):
        image = {**NUMBERS, "size": EDGES}
        size = {"shortest_edge": 784, "longest_edge": 9408}
        video = {**NUMBERS, "size": size, "do_sample_frames": True, "num_frames": 8}
        write(folder, "processor_config.json", {"image_processor": image, "video_processor": video})
        assert vision_of(folder).video == VideoSettings(8, 784, 9408)

    @pytest.mark.parametrize("nested", [False, True], ids=["a file of its own", "nested"])
    @pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "another normalisation"])
    def test_limits_are_those_of_the_stock_class(self, variant, nested, folder, monkeypatch):
        pytest.importorskip("torchvision", reason="the stock video processor needs torchvision")
        from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

        settings = {**NUMBERS, **VARIANTS[variant], "do_sample_frames": True, "num_frames": 8}
        name, content = ("processor_config.json", {"video_processor": settings}) if nested else (
            "video_preprocessor_config.json", settings
        )  # fmt: skip
        write(folder, name, content)
        monkeypatch.setattr(Qwen2VLVideoProcessor, "size", dict(Qwen2VLVideoProcessor.size))
        stock, found = Qwen2VLVideoProcessor.from_pretrained(folder), vision_of(folder).video
        assert (found.min_pixels, found.max_pixels) == (stock.size["shortest_edge"], stock.size["longest_edge"])
        assert found.num_frames == stock.num_frames

    def test_a_file_of_its_own_comes_before_that_of_images_and_after_a_nested_section(self, folder):
        assert vision_of(folder).video == VideoSettings(32, EDGES["shortest_edge"], EDGES["longest_edge"])
        write(folder, "video_preprocessor_config.json", {"max_pixels": 9408})
        assert vision_of(folder).video == VideoSettings(32, VideoSettings.min_pixels, 9408)
        write(folder, "processor_config.json", {"video_processor": {"min_pixels": 784}})
        assert vision_of(folder).video == VideoSettings(32, 784, VideoSettings.max_pixels)

    def test_frames_are_sampled_by_the_file_only_where_it_says_that_the_processor_samples(self, folder):
        write(folder, "video_preprocessor_config.json", {"do_sample_frames": False, "num_frames": 8, "fps": 2})
        assert vision_of(folder).video.num_frames == VideoSettings.num_frames

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"do_sample_frames": True, "fps": 2.0}, "fps is 2.0: frames a second are not supported"),
            ({"do_sample_frames": True, "num_frames": 7}, "num_frames is 7, wanted a multiple"),
            ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean is .*, that of images is"),
            ({"do_normalize": False}, "do_normalize is False, that of images is True"),
            ({"cap_pixels_per_frame": True}, "cap_pixels_per_frame is True"),
            ({"resample": 2}, "resample is 2"),
            ({"size": {**EDGES, **PIXELS}}, "size .*refused by transformers"),
            ({"video_processor_type": "InternVLVideoProcessor"}, "video_processor_type is 'InternVLVideoProcessor'"),
        ],
    )
    def test_what_would_be_read_otherwise_is_refused_by_file_and_key(self, settings, message, folder):
        write(folder, "video_preprocessor_config.json", settings)
        with pytest.raises(ConfigError, match=rf"video_preprocessor_config.json: {message}"):
            load_model(folder)

    def test_an_own_export_keeps_what_the_run_used(self, tmp_path):
        network = make_model("qwen2_5_vl")
        network.encoder.vision.video = VideoSettings(num_frames=7, min_pixels=784, max_pixels=9408, folder_fps=3.0)
        save_model(network, tmp_path)
        assert vision_of(tmp_path).video == network.encoder.vision.video


@pytest.mark.parametrize("name", ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2_5_VLImageProcessor"])
def test_every_name_of_the_models_own_processor_is_taken(name, folder):
    write(folder, "preprocessor_config.json", {**NUMBERS, "size": EDGES, "image_processor_type": name})
    assert vision_of(folder).processor.size == EDGES


def test_the_processor_of_another_model_is_refused_for_tiles_too(tmp_path):
    save_model(make_model("internvl"), tmp_path)
    own = json.loads((tmp_path / "preprocessor_config.json").read_text())
    for name in ("GotOcr2ImageProcessorFast", None, "Qwen2VLImageProcessor"):
        write(tmp_path, "preprocessor_config.json", {**own, "image_processor_type": name})
        if name == "Qwen2VLImageProcessor":
            with pytest.raises(ConfigError, match=r"image_processor_type is '.*', wanted GotOcr2ImageProcessor: the"):
                load_model(tmp_path)
        else:
            assert vision_of(tmp_path).processor.size == own["size"]


@pytest.mark.parametrize("resample", ["bilinear", 17, None])
def test_a_filter_that_is_none_is_named(resample, folder):
    write(folder, "preprocessor_config.json", {**NUMBERS, "size": EDGES, "resample": resample})
    write(folder, "video_preprocessor_config.json", NUMBERS)
    with pytest.raises(ConfigError, match=r"resample is .*correct preprocessor_config.json"):
        vision_of(folder)
