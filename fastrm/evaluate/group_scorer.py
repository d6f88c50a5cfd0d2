"""The methods that a reward model and an ensemble share: the rewards of groups, and the choices that these allow."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import torch

from fastrm.data.record import Record
from fastrm.data.sources.in_memory import RowsLike, is_table
from fastrm.data.sources.layouts.ixc import with_places
from fastrm.errors import ConfigError, DataError, GroupError, RecordError
from fastrm.evaluate.merging import score_merged
from fastrm.evaluate.scoring import score_dicts, score_table
from fastrm.ui import Display

Group: TypeAlias = Mapping[str, Any]
Chat: TypeAlias = Sequence[Mapping[str, Any]]
OnError: TypeAlias = Literal["raise", "return"]
TOKENS_PER_PACK = 32768


class Best(NamedTuple):
    """The response of a group that has the largest reward, the first of equal ones.

    Attributes:
        index: its place among the group's responses.
        response: as the group has it.
        reward: its own.
        rewards: those of all the group's responses.
    """

    index: int
    response: Any
    reward: float
    rewards: list[float]


class GroupScorer(ABC):
    """A scorer of groups; the reward model or ensemble that it is scores records."""

    @abstractmethod
    def _score(
        self,
        records: Sequence[Record],
        tokens_per_pack: int = TOKENS_PER_PACK,
        num_workers: int = 0,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[list[float] | RecordError]:
        """Return the rewards of each record, or why it has none; `progress` is called with (done, total)."""

    @overload
    def score(
        self, groups: RowsLike, *, convert_to_tensor: Literal[False] = False, on_error: Literal["raise"] = "raise",
        tokens_per_pack: int = ..., num_workers: int = ..., progress: bool = ...,
    ) -> list[list[float]]: ...  # fmt: skip
    @overload
    def score(
        self, groups: RowsLike, *, convert_to_tensor: Literal[True], on_error: Literal["raise"] = "raise",
        tokens_per_pack: int = ..., num_workers: int = ..., progress: bool = ...,
    ) -> list[torch.Tensor]: ...  # fmt: skip
    @overload
    def score(
        self, groups: RowsLike, *, convert_to_tensor: bool = ..., on_error: OnError,
        tokens_per_pack: int = ..., num_workers: int = ..., progress: bool = ...,
    ) -> list[Any]: ...  # fmt: skip
    def score(
        self,
        groups: RowsLike,
        *,
        tokens_per_pack: int = TOKENS_PER_PACK,
        num_workers: int = 0,
        on_error: OnError = "raise",
        convert_to_tensor: bool = False,
        progress: bool = False,
    ) -> list[Any]:
        """Return the rewards of every response, in the order of the groups.

        All responses of a group share one pass over its prompt and images. Image files are read anew at
        every call. Any number of threads may call it at once; each gets what it would get alone, to the bit.

        Args:
            groups: {"prompt": str or messages, "images": [path | bytes | PIL image], "responses":
                [str, ...]}; images may be left out. Responses may be empty, equal, and any number from one on. Also
                rows in any layout that data files have, as {"prompt", "chosen", "rejected"}, whose responses are
                scored in that order; and a pandas DataFrame or a `datasets.Dataset` of such rows, which are read
                and refused like those of a file.
            tokens_per_pack: token budget of one forward pass; the largest group must fit.
            num_workers: processes that decode images ahead of the forward passes; 0 = in this one.
            on_error: raise at the first group that cannot be scored, or return a `GroupError` in the place of its
                rewards; the other groups get theirs. A reward that is not a finite number is such an error.
            convert_to_tensor: return a float32 tensor (R,) on the CPU for each group, not a list of floats.
            progress: show it on standard error.

        Raises:
            GroupError: a `DataError` that names the group and the reason.
            ExactnessError: if the model's first rewards differ from those of the stock class (`check_exactness`).
        """
        with Display() if progress else nullcontext() as display:
            update = display.task("scoring") if display else lambda done, total: None

            def score(records: Sequence[Record]) -> list[list[float] | RecordError]:
                return self._score(records, tokens_per_pack, num_workers, update)

            results = (score_table if is_table(groups) else score_dicts)(score, groups, on_error)
        if not convert_to_tensor:
            return results
        return [one if isinstance(one, GroupError) else torch.tensor(one) for one in results]

    def get_score(self, chat: Chat, images: Any = None, max_length: None = None, hd_num: None = None) -> float:
        """Return the reward of one finished conversation, as IXC-2.5-Reward's method of this name.

        Args:
            chat: messages, the last of which is the assistant's.
            images: its images, as in `score`, one or a list. They stand where ``<ImageHere>`` or ``<image>`` in the
                prompt's texts say, else in front.
            max_length, hd_num: IXC's settings, which have no meaning here; see `get_scores`.

        Raises:
            GroupError: if it cannot be scored.
            ConfigError: for `max_length` or `hd_num`.
        """
        return self.get_scores([chat], [images], max_length, hd_num)[0]

    def get_scores(
        self, chats: Sequence[Chat], images: Sequence[Any] | None = None, max_length: None = None, hd_num: None = None
    ) -> list[float]:
        """Return the reward of each finished conversation; those with the same prompt share one pass over it.

        Args:
            images: for each conversation its images.
            max_length, hd_num: IXC's settings, the tokens at which it cuts a conversation and the squares into which it
                cuts an image. They are refused: here nothing is cut, and an image's size is its processor's setting.

        Raises:
            GroupError: for the first that cannot be scored.
            DataError: if there are not as many entries in `images`.
            ConfigError: for `max_length` or `hd_num`.
        """
        _refuse_settings(max_length, hd_num)
        given = [None] * len(chats) if images is None else list(images)
        if len(given) != len(chats):
            raise DataError(f"images: got {len(given)} entries for {len(chats)} chats, wanted one for each, or none")
        groups = [{"messages": _placed(chat), "images": own} for chat, own in zip(chats, given, strict=True)]

        def score(records: Sequence[Record]) -> list[list[float] | RecordError]:
            return score_merged(self._score, lambda rewards, places: [rewards[n] for n in places], records)

        return [reward for (reward,) in score_dicts(score, groups)]

    @overload
    def compare(self, first: Group) -> bool: ...
    @overload
    def compare(
        self, first: Chat, first_images: Any, second: Chat, second_images: Any = None, max_length: None = None,
        hd_num: None = None,
    ) -> bool: ...  # fmt: skip
    def compare(
        self, first: Any, first_images: Any = None, second: Any = None, second_images: Any = None,
        max_length: None = None, hd_num: None = None,
    ) -> bool:  # fmt: skip
        """Return whether the first has the strictly larger reward: of a group's two responses, or of two conversations.

        Args:
            max_length, hd_num: see `get_scores`.

        Raises:
            GroupError: if one cannot be scored.
            DataError: for a group of another number of responses.
            ConfigError: for `max_length` or `hd_num`.
        """
        _refuse_settings(max_length, hd_num)
        if isinstance(first, Mapping):
            (rewards,) = self.score([first])
        else:
            if second is None:
                raise DataError("compare: got one conversation, wanted (chat, images, chat, images) or a group")
            rewards = self.get_scores([first, second], [first_images, second_images])
        if len(rewards) != 2:
            raise DataError(f"compare: the group has {len(rewards)} responses, wanted 2; rank and best_of_n take more")
        return rewards[0] > rewards[1]

    @overload
    def rank(self, what: Group) -> list[int]: ...
    @overload
    def rank(
        self, what: Sequence[Chat], images: Sequence[Any] | None = None, max_length: None = None, hd_num: None = None
    ) -> list[int]: ...
    def rank(
        self, what: Any, images: Sequence[Any] | None = None, max_length: None = None, hd_num: None = None
    ) -> list[int]:
        """Return the rank of each response of a group, or of each conversation: 0 has the largest reward.

        Equal rewards have equal ranks.

        Args:
            max_length, hd_num: see `get_scores`.

        Raises:
            GroupError: if one cannot be scored.
            ConfigError: for `max_length` or `hd_num`.
        """
        _refuse_settings(max_length, hd_num)
        rewards = self.score([what])[0] if isinstance(what, Mapping) else self.get_scores(what, images)
        return [sum(other > reward for other in rewards) for reward in rewards]

    @overload
    def best_of_n(self, groups: Group) -> Best: ...
    @overload
    def best_of_n(self, groups: Sequence[Group], *, progress: bool = ...) -> list[Best]: ...
    def best_of_n(self, groups: Any, *, progress: bool = False) -> Any:
        """Return the best response of a group, or of each group of a list.

        Args:
            groups: as in `score`, each with `responses`.

        Raises:
            GroupError: for the first that cannot be scored.
        """
        if isinstance(groups, Mapping):
            return self.best_of_n([groups])[0]
        scored = zip(groups, self.score(groups, progress=progress), strict=True)
        return [_best(group, rewards) for group, rewards in scored]


def _best(group: Group, rewards: list[float]) -> Best:
    if "responses" not in group:
        raise DataError(f"best_of_n: got a group with {', '.join(map(str, group))}, wanted one with responses")
    index = max(range(len(rewards)), key=rewards.__getitem__)
    return Best(index, group["responses"][index], rewards[index], rewards)


def _refuse_settings(max_length: object, hd_num: object) -> None:
    """Refuse settings of IXC-2.5-Reward's methods, whose rewards would be others with them."""
    if max_length is not None:
        raise ConfigError(f"max_length: got {max_length}; nothing is cut here, and too long is an error: leave it out")
    if hd_num is not None:
        raise ConfigError(
            f"hd_num: got {hd_num}, the squares into which IXC-2.5-Reward cuts an image; the size of images here is a "
            "setting of the model's image processor (max_pixels): leave it out"
        )


def _placed(chat: Chat) -> list[Mapping[str, Any]]:
    """Return a conversation whose texts, but for the response, have ``<image>`` in place of ``<ImageHere>``."""
    turns = list(chat)
    for place, turn in enumerate(turns[:-1]):
        if isinstance(turn, Mapping) and isinstance(turn.get("content"), str):
            turns[place] = {**turn, "content": with_places(turn["content"])}
    return turns
