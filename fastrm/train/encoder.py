"""The tokenizer and the encoder of a configuration: the parts of a model that read rows."""

from pathlib import Path

from fastrm.config import Config, ModelConfig, TrainedTokenizer
from fastrm.data.media.format import FormatSettings
from fastrm.data.media.videos import VideoSettings
from fastrm.data.template import ConversationEncoder
from fastrm.data.tokenizer import load_tokenizer
from fastrm.model.architectures import find_architecture
from fastrm.model.export import make_encoder
from fastrm.model.loading import load_backbone_config
from fastrm.model.places import locate
from fastrm.train.writing import turn_loss_of

TOKENIZER = "tokenizer"  # folder of a trained tokenizer in the prepared set


def prepared_folder(config: Config) -> Path:
    """Return the folder of a run's prepared set."""
    return Path(config.data.prepared or Path(config.run.dir) / "prepared")


def make_tokenizer(config: Config):
    """Load the model's tokenizer; a trained one is in the prepared set's folder."""
    settings = config.model.tokenizer
    if isinstance(settings, TrainedTokenizer):
        return load_tokenizer(str(prepared_folder(config) / TOKENIZER))
    return load_tokenizer(settings or locate(config.model.path).tokenizer)


def make_data_encoder(config: Config, architecture, tokenizer) -> ConversationEncoder:
    """Put tokenizer and vision format together; `architecture` is the backbone's transformers config."""
    model, data = config.model, config.data
    video = VideoSettings(data.video_frames, data.video_min_pixels, data.video_max_pixels, data.frame_folder_fps)
    settings = FormatSettings(
        data.min_pixels, data.max_pixels, data.max_tiles, data.image_mean, data.image_std, video
    )  # fmt: skip
    processor = model.path and locate(model.path).processor
    options = model.anchor, data.limits, settings, model.template_date
    encoder = make_encoder(architecture, tokenizer, processor, *options)
    encoder.learn_turns(turn_loss_of(config))
    return encoder


def find_backbone_config(settings: ModelConfig):
    """Find the backbone's transformers config, without its weights.

    Raises:
        ConfigError: there is none, or its family is not supported.
    """
    try:
        return find_architecture(settings)[0]
    except LookupError:
        return load_backbone_config(settings.path)
