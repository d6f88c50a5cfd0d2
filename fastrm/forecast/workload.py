"""The content of a step for which costs are computed: groups of one kind, of stated, typical lengths.

    reward   image, question -> a response                                        two of them to a prompt
    critic   image, SPEC's prompt with question and response -> a critique        two of them to a prompt
    judge    image, SPEC's prompt with question and both responses -> a verdict   one text to a prompt
"""

from dataclasses import dataclass

from fastrm.config import Config
from fastrm.data.paradigm import TextReading, reading_of
from fastrm.model.network import RewardNetwork
from fastrm.paradigm_config import section_of
from fastrm.prompts.template import PromptTemplate

# One image at its largest, one question, two responses.
PROMPT_TEXT_TOKENS = 100  # question and chat template
RESPONSE_TOKENS = 300
WRITTEN_TOKENS = 300  # a critique, or thinking with its verdict
# Of an English text, which a SPEC's prompt is taken to be.
CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Workload:
    """The assumed content of one optimizer step: groups of a prompt with one image, and tails behind it.

    Attributes:
        num_pairs: preferences of the step, each of a prompt of its own; of a judge texts.
        image_tokens, prompt_text_tokens: of each prompt, which its tails share.
        response_tokens: of each tail, without what is written: a response.
        image_key: the setting that bounds an image.
        tails: behind each prompt.
        written_tokens: at the end of each tail, which a critic or judge writes; `learnt_tokens` of them have a loss.
        unit: what `num_pairs` counts, in the plural.
        lengths: the tokens of texts, in words.
    """

    num_pairs: int
    image_tokens: int
    prompt_text_tokens: int
    response_tokens: int
    image_key: str = "data.max_pixels"
    tails: int = 2
    written_tokens: int = 0
    learnt_tokens: int = 0
    unit: str = "pairs"
    lengths: str = ""

    @property
    def prompt_tokens(self) -> int:
        return self.image_tokens + self.prompt_text_tokens

    @property
    def tail_tokens(self) -> int:
        return self.response_tokens + self.written_tokens

    @property
    def num_tails(self) -> int:
        """The number of conversations of the step."""
        return self.num_pairs * self.tails

    def num_images(self, once: bool) -> int:
        """Return the images that the vision tower encodes: once for each prompt, or for each conversation."""
        return (self.num_pairs if once else self.num_tails) * (self.image_tokens > 0)

    def num_tokens(self, shared: bool) -> int:
        """Return the tokens of the step: with shared prompts, or each conversation whole."""
        return (self.num_pairs if shared else self.num_tails) * self.prompt_tokens + self.num_tails * self.tail_tokens

    def attention_pairs(self, shared: bool) -> int:
        """Return query-key pairs of causal attention in one layer: n (n + 1) / 2 for a sequence of n tokens.

        A shared prompt attends to itself once; each tail attends to the prompt and to itself.
        """
        prompt, tail = self.prompt_tokens, self.tail_tokens
        if not shared:
            return self.num_tails * causal_pairs(prompt + tail)
        return self.num_pairs * causal_pairs(prompt) + self.num_tails * (prompt * tail + causal_pairs(tail))

    @property
    def anchor_pairs(self) -> int:
        """The query-key pairs of a layer with queries at the anchors only."""
        return self.num_tails * (self.prompt_tokens + self.tail_tokens)


def causal_pairs(length: int) -> int:
    """Return the query-key pairs of causal attention over a sequence."""
    return length * (length + 1) // 2


def typical_workload(config: Config, network: RewardNetwork) -> Workload:
    """Return a step of the groups of a configuration's paradigm and, for a vision model, one image at its largest.

    The largest image has data.max_pixels for Qwen and data.max_tiles for InternVL.

    Raises:
        ConfigError: for a SPEC that cannot be used.
    """
    image_tokens, key = (0, "data.max_pixels") if network.tower is None else network.tower.largest_image(config.data)
    num_pairs, reading = config.optim.batch_pairs, reading_of(config)
    if reading is None:
        lengths = f"{PROMPT_TEXT_TOKENS} of text, {RESPONSE_TOKENS} of each response"
        return Workload(num_pairs, image_tokens, PROMPT_TEXT_TOKENS, RESPONSE_TOKENS, key, lengths=lengths)
    before, behind = _spec_tokens(reading)
    written = {"written_tokens": WRITTEN_TOKENS, "learnt_tokens": WRITTEN_TOKENS}
    asked = f"{PROMPT_TEXT_TOKENS} of question and chat template, {before + behind} of the SPEC's own words"
    if reading.kind == "critic":
        # Turns without a weight are left out of packs (packing.py).
        written["learnt_tokens"] *= section_of(config).lm_weight > 0
        lengths = f"{asked}, {RESPONSE_TOKENS} of each response, {WRITTEN_TOKENS} of each critique"
        text, own = PROMPT_TEXT_TOKENS + before, RESPONSE_TOKENS + behind
        return Workload(num_pairs, image_tokens, text, own, key, **written, lengths=lengths)
    lengths = f"{asked}, {RESPONSE_TOKENS} of each of two responses, {WRITTEN_TOKENS} of thinking and verdict"
    text = PROMPT_TEXT_TOKENS + before + behind + 2 * RESPONSE_TOKENS
    return Workload(num_pairs, image_tokens, text, 0, key, tails=1, **written, unit="texts", lengths=lengths)


def _spec_tokens(reading: TextReading) -> tuple[int, int]:
    """Return about how many tokens a SPEC's own words are: before the first response, and behind it."""
    names, mark = ("response",) if reading.kind == "critic" else ("first", "second"), "\0"
    text = PromptTemplate(reading.prompt, names).fill(question="", **dict.fromkeys(names, mark))
    before, _, behind = (reading.system + text).partition(mark)
    return tuple(-(-len(part.replace(mark, "")) // CHARACTERS_PER_TOKEN) for part in (before, behind))
