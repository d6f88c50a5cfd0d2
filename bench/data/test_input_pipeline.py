"""The work of a data worker for a pack, on one core: images/s against the stock image processor, and its parts.

Both sides take the same files. The stock side makes float patches of two frames with transformers' PIL image
processor; ours makes patches of bytes, and the device makes floats of them (`with values`: the core does that too).
Equality, to the bit, is asserted first. All times are CPU seconds of one thread, which other work on the
machine disturbs the least.
"""

import io
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig

from bench import DATA
from bench.harness.results import cpu_name, file_of, package_versions, write_json
from fastrm.data import loader
from fastrm.data.batching import PackPlan
from fastrm.data.media import qwen2_vl
from fastrm.data.media.format import PatchFormat
from fastrm.data.media.images import decode_image
from fastrm.data.quarantine import Quarantine
from fastrm.data.record import ImageRef, Message, Preference, Record, Response
from fastrm.data.sources import read_source
from fastrm.data.tokenizer import train_tokenizer
from fastrm.limits import MediaLimits
from fastrm.model.backbone import LayoutBuilder
from fastrm.model.export import make_encoder
from fastrm.model.vision.qwen2_vl import VisionShape

LIMITS = MediaLimits()
ROUNDS = 5
VOCABULARY = 8192
GROUPS_PER_PACK = 8
PAIRS_PER_SECOND = (1, 4, 16, 64)  # rates of a GPU, for the table of cores
# Folder, and quantiles of its images' sizes, which are used if it is absent.
PHOTOS = "owleval/cases", (
    (514, 394), (578, 722), (706, 702), (736, 770), (1022, 618), (1036, 692),
    (860, 862), (942, 944), (730, 1386), (1336, 1006), (988, 1560), (1428, 1386),
)  # fmt: skip
FIGURES = "mathv_pairs/images", (
    (102, 112), (241, 255), (393, 219), (288, 386), (756, 176), (545, 290),
    (443, 424), (545, 397), (494, 540), (824, 370), (1024, 430), (1044, 917),
)  # fmt: skip
# Measured ratios of CPU time: 2.1 to 2.3, and 1.9 to 2.2 with decoding. Both sides spend the rest in Pillow's resize.
FLOOR, DECODING_FLOOR = 1.6, 1.4


@dataclass(frozen=True)
class Images:
    """Images/s of one core. With `values` ours computes the floats there too, and not on the device."""

    workload: str
    num_images: int
    megapixels: float  # of the files, and as the tower sees them
    resized_megapixels: float
    decoding: bool
    stock: float
    ours: float
    values: float
    floor: float


@dataclass(frozen=True)
class Work:
    """Milliseconds of one core for a pair, by kind of work, and the bytes of handing it over."""

    workload: str
    num_pairs: int
    num_images: int
    ms_per_pair: dict[str, float]
    patch_bytes_per_pair: float

    @property
    def total_ms(self) -> float:
        return sum(self.ms_per_pair.values())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def found(request):
    """Yield the measurements of this run; print their tables at its end, and save JSON with --save-results."""
    images, work = [], []
    yield images, work
    if not (images or work):
        return
    plugins = request.config.pluginmanager
    # Tables printed in a test's teardown would be captured.
    with plugins.getplugin("capturemanager").global_and_fixture_disabled():
        terminal = plugins.getplugin("terminalreporter")
        terminal.section("input pipeline, one core")
        for line in [*image_lines(images), "", *work_lines(work)]:
            terminal.write_line(line)
        if request.config.getoption("--save-results"):
            terminal.write_line(f"saved to {save(images, work)}")


def image_lines(cases: Sequence[Images]) -> list[str]:
    lines = [
        f"{'images/s':<22}{'images':>7}{'MP in':>7}{'MP out':>8}{'decoding':>10}{'stock':>8}{'ours':>8}{'times':>7}"
        f"{'with values':>13}{'floor':>7}"
    ]
    for case in cases:
        lines.append(
            f"{case.workload:<22}{case.num_images:>7}{case.megapixels:>7.1f}{case.resized_megapixels:>8.1f}"
            f"{'yes' if case.decoding else 'no':>10}{case.stock:>8.1f}{case.ours:>8.1f}{case.ours / case.stock:>7.2f}"
            f"{case.values:>13.1f}{case.floor:>7.1f}"
        )
    return lines


def work_lines(cases: Sequence[Work]) -> list[str]:
    lines = []
    for case in cases:
        parts = sorted(case.ms_per_pair.items(), key=lambda part: -part[1])
        shares = ", ".join(f"{name} {ms / case.total_ms:.0%}" for name, ms in parts)
        cores = ", ".join(f"{rate} pairs/s {rate * case.total_ms / 1000:.2g}" for rate in PAIRS_PER_SECOND)
        lines += [
            f"{case.workload}: {case.num_pairs} pairs with {case.num_images} images, {case.total_ms:.1f} ms a pair and "
            f"{case.patch_bytes_per_pair / 1024:,.0f} KiB of patches: {shares}",
            f"    cores for a GPU of: {cores}",
        ]
    return lines


def save(images: Sequence[Images], work: Sequence[Work]) -> Path:
    device = cpu_name()
    report = {
        "device": device,
        "threads": 1,
        "versions": package_versions("torch", "transformers", "pillow", "numpy"),
        "images": [asdict(case) for case in images],
        "work": [asdict(case) for case in work],
    }
    file = file_of(device, "-input-pipeline.json")
    write_json(file, report, indent=2)
    return file


def read_images(folder: str, sizes: Sequence[tuple[int, int]], count: int) -> tuple[list[ImageRef], str]:
    """Read at most `count` files of a folder of the shared data; return them with a suffix for the workload's name."""
    if (DATA / folder).is_dir():
        files = sorted((DATA / folder).iterdir())
        return [ImageRef(data=file.read_bytes()) for file in files[:: -(-len(files) // count)]], ""
    return [ImageRef(data=_jpeg(size, seed)) for seed, size in enumerate(sizes)], " (synthetic)"


def _jpeg(size: tuple[int, int], seed: int) -> bytes:
    """Return a JPEG as smooth as a photograph."""
    coarse = np.random.default_rng(seed).integers(0, 256, (size[1] // 12, size[0] // 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def vision():
    """Return the recipe's image settings, which are those of the stock processor."""
    return AutoConfig.for_model("qwen2_5_vl")


def encoder_of(vision, records: Sequence[Record]):
    tokenizer = train_tokenizer((r.messages for record in records for r in record.responses), VOCABULARY)
    return make_encoder(vision, tokenizer, None, "last_token", LIMITS)


@pytest.mark.parametrize("decoding", [False, True], ids=["decoded", "files"])
@pytest.mark.parametrize(("name", "kind"), [("photos", PHOTOS), ("figures", FIGURES)])
def test_images_per_second(name, kind, decoding, vision, found, benchmark):
    refs, suffix = read_images(*kind, 48)
    encoder = encoder_of(vision, [_pair(0, (), "Which?", ("This one.", "That one."))])
    reader = encoder.vision
    processor, form = reader.processor, reader.patch_format
    decoded = [decode_image(ref, LIMITS) for ref in refs]

    def stock(number: int) -> torch.Tensor:
        image = Image.open(io.BytesIO(refs[number].data)) if decoding else decoded[number]
        return processor(images=[image], return_tensors="pt")["pixel_values"]

    def ours(number: int) -> torch.Tensor:
        image = decode_image(refs[number], LIMITS) if decoding else decoded[number]
        return torch.from_numpy(reader.cut_image(image, reader.image_tokens(*image.size, refs[number])).values)

    def with_values(number: int) -> torch.Tensor:
        return form.normalize(ours(number))

    num_patches = 0
    for number in range(len(refs)):
        wanted, patches = stock(number), ours(number)
        assert torch.equal(form.normalize(patches), wanted), f"image {number} of {name}: values differ"
        assert 8 * patches.nbytes == wanted.nbytes
        num_patches += patches.shape[0]
    seconds = _alternate((stock, ours, with_values), len(refs), benchmark)
    if seconds is None:
        return
    rates = [len(refs) / statistics.median(times) for times in seconds]
    floor = DECODING_FLOOR if decoding else FLOOR
    pixels = sum(image.width * image.height for image in decoded)
    found[0].append(
        Images(name + suffix, len(refs), pixels / 1e6, num_patches * form.side**2 / 1e6, decoding, *rates, floor)
    )
    assert rates[1] >= floor * rates[0], f"{name}: {rates[1]:.1f} images/s against {rates[0]:.1f}, wanted {floor} times"


def _alternate(variants: Sequence[Callable[[int], object]], count: int, benchmark) -> list[list[float]] | None:
    """Return CPU seconds of each variant over all images, for each round; None under --benchmark-disable."""
    if benchmark.disabled:
        benchmark(lambda: None)
        return None
    seconds: dict[Callable, list[float]] = {variant: [] for variant in variants}

    def run(variant):
        started = time.process_time()
        for number in range(count):
            variant(number)
        seconds[variant].append(time.process_time() - started)

    def rest():
        for variant in variants:
            if variant is not variants[1]:
                run(variant)

    benchmark.pedantic(run, args=(variants[1],), setup=rest, rounds=ROUNDS, warmup_rounds=1)
    return [times[1:] for times in seconds.values()]


def _pair(number: int, images: Sequence[ImageRef], question: str, answers: Sequence[str]) -> Record:
    turn = Message("user", (*images, question))
    responses = tuple(Response((turn, Message("assistant", (answer,)))) for answer in answers)
    return Record(f"{number}", responses, (Preference(0, 1),), "bench", f"bench:{number}")


def mixed_records() -> tuple[list[Record], str]:
    """Return records with text and images of many sizes."""
    if (DATA / "quickstart_mix").is_dir():
        return list(read_source(DATA / "quickstart_mix" / "train.jsonl", quarantine=Quarantine(None))), ""
    return _synthetic(FIGURES, num_words=60), " (synthetic)"


def photo_records() -> tuple[list[Record], str]:
    """Return records of a photograph, a short question, and two answers of 150 to 450 words."""
    refs, suffix = read_images(*PHOTOS, 48)
    return _synthetic((None, refs), num_words=300), suffix


def _synthetic(kind, num_words: int) -> list[Record]:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(2, 9))) for _ in range(4000)]
    records = []
    for number, image in enumerate(kind[1]):
        ref = image if isinstance(image, ImageRef) else ImageRef(data=_jpeg(image, number))
        question, *answers = (
            " ".join(rng.choice(words, int(count * rng.uniform(0.5, 1.5)))) for count in (40, num_words, num_words)
        )
        records.append(_pair(number, (ref,), question, answers))
    return records


class Stopwatch:
    """CPU seconds by name; time in a nested call counts for that call alone."""

    def __init__(self):
        self.seconds = defaultdict(float)
        self._names = ["rest of the builder"]
        self._since = 0.0

    def wrap(self, name: str, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            self._switch()
            self._names.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._names.pop()

        return timed

    def _switch(self) -> None:
        now = time.process_time()
        self.seconds[self._names[-1]] += now - self._since
        self._since = now

    def run(self, function: Callable) -> None:
        self._since = time.process_time()
        function()
        self._switch()


@pytest.mark.parametrize("make_records", [mixed_records, photo_records], ids=["mixed", "photos"])
def test_where_a_workers_time_goes(make_records, vision, found, monkeypatch, benchmark):
    records, suffix = make_records()
    encoder = encoder_of(vision, records)
    clock = Stopwatch()
    # Layouts for the Triton kernels with heads of Qwen2.5-VL: the most that a worker can have to do.
    lay_out = LayoutBuilder(VisionShape.from_config(vision.vision_config), (torch.bfloat16, 128, 80))
    builder = loader.PackBuilder(records, encoder, True, multiple=16, lay_out=clock.wrap("layouts", lay_out))
    for name, module, target in (
        ("decode", qwen2_vl, "decode_image"), ("tokenise", loader, "encode_group"), ("pack", loader, "build_pack"),
    ):  # fmt: skip
        monkeypatch.setattr(module, target, clock.wrap(name, getattr(module, target)))
    monkeypatch.setattr(PatchFormat, "cut", clock.wrap("cut", PatchFormat.cut))
    monkeypatch.setattr(Image.Image, "resize", clock.wrap("resize", Image.Image.resize))
    plans = [
        PackPlan(tuple(range(first, min(first + GROUPS_PER_PACK, len(records)))), first, True)
        for first in range(0, len(records), GROUPS_PER_PACK)
    ]
    hand_over = clock.wrap("hand over", ForkingPickler.dumps)
    kept = [builder[plan] for plan in plans]  # this also reads the headers, which training has read before
    assert not any(loaded.refused for loaded in kept)
    clock.seconds.clear()
    benchmark.pedantic(lambda: clock.run(lambda: [hand_over(builder[plan]) for plan in plans]), rounds=3)
    if benchmark.disabled:
        return
    num_bytes = sum(loaded.pack.patches.nbytes for loaded in kept if loaded.pack.patches is not None)
    num_images = sum(len(loaded.pack.media_grids) for loaded in kept)
    ms = {name: 1000 * seconds / 3 / len(records) for name, seconds in clock.seconds.items()}
    found[1].append(Work(make_records.__name__ + suffix, len(records), num_images, ms, num_bytes / len(records)))
