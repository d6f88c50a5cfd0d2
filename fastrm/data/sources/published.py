"""The published preference sets: their places, their files' layouts, and the paper's use of each.

From the sets' cards and the code that reads them; what was not seen in a file or in its authors' code is
marked [C] in docs/data_sources.md. `fastrm data sets` prints the table.
"""

import difflib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastrm.data.media.archives import archive_exists
from fastrm.data.sources.hub import hub_folder
from fastrm.data.sources.media import Resolve, in_archives, in_folder, path_resolver
from fastrm.data.sources.mmpr_meta import mmpr_files
from fastrm.data.sources.reader import SourceFile
from fastrm.errors import DataError, looked_for
from fastrm.tables import Table
from fastrm.ui import make_console, print_table, say

# Values of PublishedSet.media; any other is the name of an archive in the set's folder.
NONE, EMBEDDED, ARCHIVES, MMPR, ELSEWHERE = "none", "embedded", "archives", "mmpr", "elsewhere"


@dataclass(frozen=True)
class PublishedSet:
    """A preference set as published.

    Attributes:
        hub: its name on the hub, owner/name.
        role: the paper's use of it: kept, dropped, ablation, or other (not in the paper).
        num_pairs: number of preferences as the paper [P] or the card says.
        files: its data files, as glob patterns below its folder.
        layout: a name of FORMATS.
        media: NONE; EMBEDDED in the rows; ARCHIVES: the first folder of a path names the archive; MMPR: meta.json
            says; ELSEWHERE: not in the set; or the name of the one archive.
        licence: the licence that its card states; "not stated" where it does not.
        pairs: ``all`` or ``hard``, for scored responses.
        rows: see `SourceFile`.
        ignore: columns that name the embedded image once more, as it was called elsewhere.
    """

    name: str
    hub: str
    role: str
    num_pairs: str
    files: tuple[str, ...]
    layout: str
    media: str
    licence: str
    pairs: str = "all"
    rows: str = "all"
    ignore: tuple[str, ...] = ()

    @property
    def patterns(self) -> tuple[str, ...]:
        """Glob patterns of the files that are needed of the hub's repository.

        The hub's ``**/`` does not match an empty path, so that such patterns are there twice.
        """
        files = tuple(dict.fromkeys(form for file in self.files for form in (file, file.removeprefix("**/"))))
        if self.media in (NONE, EMBEDDED, ELSEWHERE):
            return files
        if self.media in (ARCHIVES, MMPR):
            return (*files, "*.zip", "*.tar", "*.zip_*")
        return (*files, f"{self.media}*")


_PARQUET = ("**/train*.parquet",)
_TULU = (_PARQUET, "trl", NONE)

_SETS = (
    PublishedSet("rlaif-v", "openbmb/RLAIF-V-Dataset", "kept", "83k [P]", ("*.parquet",), "flat", EMBEDDED,
                 "cc-by-nc-4.0", ignore=("image_path",)),
    PublishedSet("mmpr-v1.2", "OpenGVLab/MMPR-v1.2", "kept", "2M [P]", ("meta.json",), "mmpr", MMPR, "MIT"),
    PublishedSet("mmpr-v1.1", "OpenGVLab/MMPR-v1.1", "other", "-", ("meta.json",), "mmpr", MMPR, "MIT"),
    PublishedSet("mmpr-v1.0", "OpenGVLab/MMPR", "other", "-", ("meta.json",), "mmpr", MMPR, "MIT"),
    PublishedSet("mm-rlhf", "yifanzhang114/MM-RLHF", "ablation", "120k", ("dpo_pairs.jsonl",), "flat", ARCHIVES,
                 "MIT", rows="with_media"),
    PublishedSet("mm-rlhf-images", "yifanzhang114/MM-RLHF", "kept, in R1-Reward's 200k", "105,740 [P]",
                 ("dpo_pairs.jsonl",), "flat", ARCHIVES, "MIT", rows="with_images"),
    PublishedSet("vlfeedback", "MMInstruction/VLFeedback", "kept, in R1-Reward's 200k", "380k of 80,258 prompts",
                 ("vlfeedback_80k.jsonl",), "completions", "merged_images.zip", "not stated"),
    PublishedSet("vlfeedback-pairs", "Zhihui/VLFeedback", "other", "381,904", _PARQUET, "llamafactory", EMBEDDED,
                 "not stated"),
    PublishedSet("povid", "YiyangAiLab/POVID_preference_data_for_VLLMs", "kept, in R1-Reward's 200k", "17,184 [P]",
                 ("*.json",), "povid", ELSEWHERE, "cc-by-4.0"),
    PublishedSet("wildvision-battle", "WildVision/wildvision-battle", "kept, in R1-Reward's 200k", "10,383 [P]",
                 ("**/*.parquet",), "arena", EMBEDDED, "odc-by"),
    PublishedSet("tulu-3-if", "allenai/tulu-3-IF-augmented-on-policy-70b", "kept", "65k [P]", *_TULU, "odc-by"),
    PublishedSet("olmo-2-mix", "allenai/olmo-2-1124-7b-preference-mix", "kept", "378k [P]", *_TULU,
                 "odc-by, parts non-commercial"),
    PublishedSet("ultra-hard", "openbmb/UltraFeedback", "kept", "63k [P]", ("*.jsonl",), "completions", NONE, "MIT",
                 pairs="hard"),
    PublishedSet("ultra-all", "openbmb/UltraFeedback", "dropped", "300k [P]", ("*.jsonl",), "completions", NONE,
                 "MIT"),
    PublishedSet("wildchat-ultrafeedback", "allenai/tulu-3-wildchat-ultrafeedback", "kept, in Others 63k [P]", "-",
                 *_TULU, "not stated"),
    PublishedSet("swe-arena", "bigcode/swe-arena-preference-5k", "kept, in Others 63k [P]", "5k",
                 ("**/*.parquet", "**/*.jsonl"), "auto", NONE, "not stated"),
    PublishedSet("mmif", "ChrisDing1105/MMIF-23k", "dropped", "22k [P]", ("v2/dpo/mmif_23k_4o_qwen2_5.json",),
                 "llamafactory", ARCHIVES, "apache-2.0"),
    PublishedSet("omnialign-v-dpo", "PhoenixZ/OmniAlign-V-DPO", "dropped", "120k [P]", ("*.jsonl",), "auto",
                 "images.tar", "not seen"),
    PublishedSet("shp", "stanfordnlp/SHP", "dropped", "348k [P]", ("*/train.json",), "labelled", NONE, "not stated"),
    PublishedSet("rlhf-v", "openbmb/RLHF-V-Dataset", "other", "5.7k", ("*.parquet",), "json_text", EMBEDDED,
                 "cc-by-nc-4.0", ignore=("image_path",)),
    PublishedSet("visionarena-battle", "lmarena-ai/VisionArena-Battle", "other", "30k", ("**/*.parquet",), "arena",
                 EMBEDDED, "its own agreement"),
    PublishedSet("llava-critic", "lmms-lab/llava-critic-113k", "other", "40,154", ("pairwise/*.parquet",), "judge",
                 EMBEDDED, "apache-2.0"),
    PublishedSet("r1-reward-rl", "yifanzhang114/R1-Reward-RL", "other", "17,261", ("**/*.parquet",), "judge",
                 EMBEDDED, "not seen"),
    PublishedSet("helpsteer2", "nvidia/HelpSteer2", "other", "10k", ("train.jsonl*",), "helpsteer", NONE,
                 "CC-BY-4.0"),
    PublishedSet("helpsteer2-preference", "nvidia/HelpSteer2", "other", "-", ("preference/*.jsonl*",), "labelled",
                 NONE, "CC-BY-4.0"),
    PublishedSet("helpsteer3", "nvidia/HelpSteer3", "other", "40k", ("preference/train.jsonl*",), "labelled", NONE,
                 "CC-BY-4.0"),
    PublishedSet("skywork-v0.1", "Skywork/Skywork-Reward-Preference-80K-v0.1", "other", "82k", *_TULU, "not stated"),
    PublishedSet("skywork-v0.2", "Skywork/Skywork-Reward-Preference-80K-v0.2", "other", "77k", *_TULU, "not stated"),
)  # fmt: skip
PUBLISHED = {published.name: published for published in _SETS}


def find_set(name: str) -> PublishedSet:
    """Find the published set of a name.

    Raises:
        DataError: if there is none, with the nearest name that exists.
    """
    if name not in PUBLISHED:
        near = difflib.get_close_matches(name, PUBLISHED, n=1)
        hint = f'did you mean "{near[0]}"?' if near else "see `fastrm data sets`"
        raise DataError(f'data set "{name}" is not known; {hint}')
    return PUBLISHED[name]


def set_files(published: PublishedSet, folder: str | None, images: str | None, **reading) -> list[SourceFile]:
    """Return the data files of a set.

    Args:
        folder: the folder of its published files; None: the hub.
        images: the folder of its images, if it is not the published one.
        reading: further fields of `SourceFile`.

    Raises:
        DataError: if files are missing, or the hub cannot be reached.
    """
    root = Path(folder if folder is not None else hub_folder(published.hub, published.patterns))
    if not root.is_dir():
        wanted = f"wanted a copy of {published.hub}"
        raise DataError(f'set "{published.name}": "{root}" is not a folder{looked_for(root)}; {wanted}')
    reading["ignore"] = (*reading.get("ignore", ()), *published.ignore)
    open_file = partial(SourceFile, rows=published.rows, **reading)
    if published.media == MMPR:
        return mmpr_files(root, images, open_file)
    files = sorted({str(file) for pattern in published.files for file in root.glob(pattern) if file.is_file()})
    if not files:
        wanted = " or ".join(published.files)
        raise DataError(f'set "{published.name}": "{root}" has no {wanted}; wanted the files of {published.hub}')
    resolve = _media_resolver(published, root, images)
    return [open_file(file, resolve) for file in files]


def _media_resolver(published: PublishedSet, root: Path, images: str | None) -> Resolve:
    if images is not None:
        return path_resolver(images)
    if published.media == ELSEWHERE:
        raise DataError(
            f'set "{published.name}" comes without its images, COCO train2014 or train2017; '
            "set `images` to their folder"
        )
    if published.media == ARCHIVES:
        return in_archives(str(root))
    if published.media in (NONE, EMBEDDED):
        return in_folder(str(root))
    archive = root / published.media
    unpacked = archive.with_suffix("")
    if not archive_exists(str(archive)) and not unpacked.is_dir():
        raise DataError(f'set "{published.name}": "{archive}" is missing; wanted it, or the folder "{unpacked.name}"')
    return path_resolver(str(archive if archive_exists(str(archive)) else unpacked))


def print_sets() -> None:
    """Print the table of all sets on standard output: on a terminal the columns that fit, everything elsewhere."""
    columns = {
        "name": [published.name for published in _SETS],
        "in the paper": [published.role for published in _SETS],
        "pairs": [published.num_pairs for published in _SETS],
        "hub id": [published.hub for published in _SETS],
        "layout": [f"{p.layout}, pairs: hard" if p.pairs == "hard" else p.layout for p in _SETS],
        "images": [published.media for published in _SETS],
        "licence": [published.licence for published in _SETS],
    }
    console = make_console()
    num_columns = len(columns)
    while console.is_terminal and num_columns > 1 and _sets_table(columns, num_columns).width > console.width:
        num_columns -= 1
    table = _sets_table(columns, num_columns)
    console.width = max(console.width, table.width)
    print_table(console, table)
    if hidden := list(columns)[num_columns:]:
        say(console, f"A wider terminal also shows: {', '.join(hidden)}. docs/data_sources.md has all.")


def _sets_table(columns: dict[str, list[str]], number: int) -> Table:
    """Return the table of the first columns."""
    table = Table(*list(columns)[:number], title="Published sets, read with `set: NAME`", text=range(number))
    for cells in zip(*list(columns.values())[:number], strict=True):
        table.add_row(*cells)
    return table
