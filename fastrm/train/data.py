"""The prepared set of a run: found, or made before the first step, or made ahead of time by a command."""

import os
from collections.abc import Iterator
from contextlib import ExitStack

from fastrm.config import Config, TrainedTokenizer
from fastrm.data.prepared.build import Preparation
from fastrm.data.prepared.records import read_refusals
from fastrm.data.prepared.report import draw_report, pair_lines, report_tables, sharing_line
from fastrm.data.prepared.stored import REFUSED, PreparedSet, read_manifest
from fastrm.data.prepared.units import Unit
from fastrm.data.quarantine import Quarantine
from fastrm.data.record import Record
from fastrm.data.sources import read_source
from fastrm.data.template import ConversationEncoder
from fastrm.data.tokenizer import train_tokenizer
from fastrm.data_config import AgainstConfig
from fastrm.errors import ConfigError, InterruptedRun
from fastrm.evaluate.benchmarks import BENCHMARKS, load_benchmark
from fastrm.model.adopt import adopt_what_is_here
from fastrm.model.families import chat_layout
from fastrm.stop import StopRequest
from fastrm.storage import locked_folder, whole_folder
from fastrm.train.encoder import TOKENIZER, find_backbone_config, make_data_encoder, make_tokenizer, prepared_folder
from fastrm.train.step_cost import make_cost_model
from fastrm.train.template_date import fix_date
from fastrm.ui import Display, print_table


class RunData:
    """The data of a run, prepared in two steps: a tokenizer may have to be trained between them.

    `begin` and `end` are for the process that prepares; the others call `open` when it has done both.
    """

    def __init__(self, config: Config, display: Display, num_workers: int | None = None):
        if not config.data.train:
            raise ConfigError("data.train is empty; name at least one source, for example - {path: train.jsonl}")
        self.config, self.display = config, display
        self.folder = prepared_folder(config)
        self._preparation = Preparation(
            config, self.folder, display,
            is_own=config.data.prepared is None,
            benchmarks=lambda: benchmark_records(config, display),
            num_workers=num_workers or len(os.sched_getaffinity(0)),
        )  # fmt: skip
        self._units: list[Unit] | None = None  # None: the set was found
        self._lock = ExitStack()

    def begin(self) -> None:
        """Find the set, or read the sources; train the tokenizer if the configuration asks for one.

        Raises:
            ConfigError, DataError, StorageError: whatever is wrong with the sources or the folder.
        """
        # A set that is there is only read: many runs may do so at a time, also in a folder that cannot be written.
        is_there = self._preparation.find()
        if not is_there:
            busy = "another process is preparing data there; wait for it"
            self._lock.enter_context(locked_folder(self.folder, "the folder of prepared data", busy))
            is_there = self._preparation.find()  # another process may have made it meanwhile
        if is_there:
            self._lock.close()
            self.display.say(f"prepared set found: {self.folder}")
            return
        self._preparation.discard()
        self.display.say(f"preparing the data in {self.folder}")
        self._units = self._preparation.read()
        if isinstance(self.config.model.tokenizer, TrainedTokenizer):
            self._train_tokenizer()

    def end(self, encoder: ConversationEncoder, architecture) -> dict | None:
        """Make the set if it was not found; return its report then.

        Args:
            architecture: the backbone's transformers config, from which the costs of work are derived.

        Raises:
            ConfigError: if the set that was found was counted with another encoder.
            DataError, StorageError: if no group is left, or the folder cannot be written.
        """
        with self._lock:
            if self._units is None:
                self._preparation.check_encoder(encoder)
                return None
            cost = make_cost_model(architecture, self.config.model, self.config.paradigm)
            report = self._preparation.finish(self._units, encoder, cost)
        refused = Quarantine(None)
        self.refusals_into(refused)
        for line in (*pair_lines(report), *refused.reasons()):
            self.display.say(line)
        self.display.say(f"prepared set made: {self.folder}; {sharing_line(report)}")
        return report

    def close(self) -> None:
        """Let other processes prepare in the folder."""
        self._lock.close()

    def open(self) -> tuple[PreparedSet, PreparedSet | None]:
        """Return the training set and the evaluation set, which is None if there is none."""
        manifest = read_manifest(self.folder)
        train, evaluated = (PreparedSet(self.folder, split, manifest, self.config) for split in ("train", "eval"))
        return train, evaluated if len(evaluated) else None

    def refusals_into(self, quarantine: Quarantine) -> None:
        """Add the set's refusals to the run's quarantine."""
        for refusal in read_refusals(self.folder / REFUSED):
            refusal.add_to(quarantine)

    def _train_tokenizer(self) -> None:
        """Train the tokenizer on the records that were just read; an older one may be of other records."""
        records = self._preparation.training_records(self._units)
        conversations = (response.messages for record in records for response in record.responses)
        # The schema requires model.init if a tokenizer is trained.
        settings = self.config.model
        layout = chat_layout(settings.init["model_type"])
        tokenizer = train_tokenizer(conversations, settings.tokenizer.train_vocab_size, layout)
        with whole_folder(self.folder / TOKENIZER) as folder:
            tokenizer.save_pretrained(folder)


def benchmark_records(config: Config, display: Display) -> Iterator[Record]:
    """Yield the records of all benchmarks in `data.decontaminate.against`; say how many rows cannot be read.

    Raises:
        ConfigError, DataError: one of them does not exist or cannot be read.
    """
    for entry in config.data.decontaminate.against:
        if isinstance(entry, str):
            entry = AgainstConfig(name=entry) if entry in BENCHMARKS else AgainstConfig(path=entry)
        yield from _records_against(entry, display)


def _records_against(entry: AgainstConfig, display: Display) -> Iterator[Record]:
    if entry.name is not None:
        yield from load_benchmark(entry.name, entry.path, entry.images).records
        return
    with Quarantine(None) as unread:
        yield from read_source(entry.path, images=entry.images, require_preferences=False, quarantine=unread)
        if unread.total:
            reasons = ", ".join(f"{code} {number:,}" for code, number in unread.counts.most_common())
            display.say(
                f"data.decontaminate: {unread.total:,} rows of {entry.path} cannot be read and are not looked for "
                f"({reasons}); correct them, or set images for it"
            )


def make_set(config: Config, display: Display, num_workers: int | None = None) -> dict | None:
    """Make the prepared set of a configuration, without its weights.

    Returns:
        the report, or None if the set was there already.

    Raises:
        ConfigError, DataError, StorageError: as `RunData`.
    """
    config, _ = adopt_what_is_here(config)  # the trained head determines the token that it reads
    config = fix_date(config, prepared_folder(config), display.say)
    data = RunData(config, display, num_workers)
    try:
        data.begin()
        architecture = find_backbone_config(config.model)
        return data.end(make_data_encoder(config, architecture, make_tokenizer(config)), architecture)
    finally:
        data.close()


def prepare_ahead(config: Config, num_workers: int | None = None) -> None:
    """Run `fastrm data prepare`: `make_set`, with a table and a picture.

    Raises:
        InterruptedRun: after SIGTERM or Ctrl-C.
        FastrmError: another subclass, as `make_set`.
    """
    with Display() as display:
        try:
            report = make_set(config, display, num_workers)
        except StopRequest as stop:
            raise InterruptedRun(
                f"stopped by {stop.name}; the parts that are done are kept, and the same command goes on from there"
            ) from None
        if report is None:
            return
        folder = prepared_folder(config)
        draw_report(report, folder / "report.png")
        for table in report_tables(report):
            print_table(display.console, table)
        display.say(f"report.json and report.png are in {folder}, refused rows in {folder / REFUSED}")
