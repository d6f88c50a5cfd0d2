"""The settings that a prepared set depends on, and the difference between a stored set and the present ones."""

import io
import os
from contextlib import suppress
from dataclasses import asdict

from PIL import Image

from fastrm.config import Config
from fastrm.data.paradigm import reading_of
from fastrm.data.prepared.stored import SPLITS, fingerprint_of
from fastrm.data.prepared.units import ReadSettings, file_status, open_source
from fastrm.data.record import ImageRef
from fastrm.data.template import ConversationEncoder
from fastrm.errors import DataError, RecordError
from fastrm.yaml_files import differences

FORMAT = 5  # format of the index, and of the rules by which rows are read; sets of another format are refused
# The keys of `data` that do not change a prepared set.
_FREE_KEYS = {"prepared", "num_workers", "image_mean", "image_std"}


def difference(manifest: dict, config: Config) -> str | None:
    """Return how a finished set differs from what configuration and files would make now; None if in nothing."""
    if manifest["format"] != FORMAT:
        return f"has format {manifest['format']}, wanted {FORMAT}"
    if changed := differences(manifest["settings"], set_settings(config), in_lists=True):
        texts = (f"{key}: {old!r} there, {new!r} now" for key, (old, new) in changed.items())
        return f"was made under other settings ({'; '.join(texts)})"
    for path, status in manifest["files"].items():
        now = file_status(path)
        # A set may be used where its sources are missing; where they are, they must be the same.
        if now is not None and list(now) != status:
            return f"{path} has changed since"
    if new := _new_files(manifest, config):
        return f"{new[0]} is new"
    return None


def encoder_key(encoder: ConversationEncoder) -> dict[str, str]:
    """Return hashes, by name, of what a set's counts depend on: tokenizer with template, and sizes of images."""
    tokenizer = encoder.tokenizer
    vision = encoder.vision
    shapes = [] if vision is None else [
        type(vision).__name__, sorted(vision.placeholders.values()), list(vision.opening), list(vision.closing),
        [_probe(encoder, side) for side in ((8, 8), (90, 60), (640, 480), (3000, 2000))],
    ]  # fmt: skip
    template = [tokenizer.chat_template, encoder.anchor]
    if encoder.anchor == "before_padding":
        template.append(encoder.pad_token_id)
    return {
        "tokenizer": fingerprint_of([], tokenizer.backend_tokenizer.to_str())[:24],
        "chat template": fingerprint_of([], template)[:24],
        "image processor": fingerprint_of([], shapes)[:24],
    }


def _probe(encoder: ConversationEncoder, size: tuple[int, int]) -> list | str:
    """Return how the encoder sees an image of this many pixels."""
    file = io.BytesIO()
    Image.new("1", size).save(file, "PNG")
    try:
        return list(encoder.vision.measure(ImageRef(data=file.getvalue()), encoder.limits))
    except RecordError as error:
        return error.code


def read_settings(config: Config) -> ReadSettings:
    """Return the part of the configuration that decides how rows are read."""
    data, wanted = config.data, config.data.decontaminate
    return ReadSettings.within(
        data.limits,
        texts=wanted is not None and (wanted.image_question or wanted.response_pair),
        # True is 1, and a distance of 0 needs the hashes too.
        looks=wanted is not None and wanted.perceptual_hash is not False,
        reading=reading_of(config),
    )


def set_settings(config: Config) -> dict:
    """Return the part of the configuration that a prepared set depends on, without the encoder's."""
    reading = reading_of(config)
    return ({} if reading is None else {"paradigm": asdict(reading)}) | {
        "data": config.data.model_dump(mode="json", exclude=_FREE_KEYS),
        "loss": {"ties": config.loss.ties},
        "optim": {"group_weight": config.optim.group_weight},
        "model": config.model.model_dump(mode="json", include={"tokenizer", "template_date"}),
    }


def file_states(config: Config) -> dict[str, list[int]]:
    """Return the `file_status` of every data file of the sources that is there, in reading order."""
    sources = [source for split in SPLITS for source in config.data.sources(split).values()]
    states = {file.path: file_status(file.path) for source in sources for file in open_source(source)}
    return {path: list(status) for path, status in states.items() if status is not None}


def _new_files(manifest: dict, config: Config) -> list[str]:
    """Return the data files that a source has now and did not have when the set was made."""
    new = []
    for source in (source for split in SPLITS for source in config.data.sources(split).values()):
        if source.path is None or not os.path.exists(source.path):
            continue  # on the hub, or gone: a set may be used without its sources
        with suppress(DataError):  # some of its files are gone
            new += [file.path for file in open_source(source) if file.path not in manifest["files"]]
    return new
