"""What families of text models have beside the layers that all of them share."""

import pytest

from fastrm.config import load_config
from fastrm.errors import ConfigError, RecordError
from fastrm.evaluate.scoring import make_ready
from fastrm.model.text import longest_path
from fastrm.train.setup import make_network
from tests.helpers import stock
from tests.helpers.runs import text_rows, tiny_config, write_rows
from tests.helpers.support import FAMILIES, make_model, make_record, pack_of

# Two responses of different lengths to one prompt.
RECORD = make_record(3, prompt_words=30, response_words=(4, 12))


def _longest(network) -> int:
    return max(len(network.encoder.encode(response).tokens) for response in RECORD.responses)


class TestMistralWindow:
    """Attention of `sliding_window` w reads the token itself and the w - 1 before it."""

    def _network(self, monkeypatch, window):
        monkeypatch.setitem(FAMILIES, "mistral", FAMILIES["mistral"] | {"sliding_window": window})
        return make_model("mistral")

    def test_rewards_equal_stock_where_the_window_holds_a_whole_path(self, monkeypatch):
        length = _longest(make_model("mistral"))
        network = self._network(monkeypatch, length)
        assert longest_path(network.model.config) == length
        pack = pack_of(network, [RECORD, RECORD])
        assert pack.num_tokens > length
        wanted = stock.stock_rewards(network, [RECORD, RECORD])
        assert (network(pack) - wanted).abs().max() <= 1e-5

    def test_a_path_of_one_token_more_is_refused_where_stock_would_mask_one(self, monkeypatch):
        length = _longest(make_model("mistral"))
        whole = stock.stock_rewards(make_model("mistral"), [RECORD])
        network = self._network(monkeypatch, length - 1)
        assert (stock.stock_rewards(network, [RECORD]) - whole).abs().max() > 1e-4
        with pytest.raises(ConfigError, match=rf"mistral with sliding_window {length - 1} is exact up to {length - 1}"):
            network(pack_of(network, [RECORD]))
        with pytest.raises(RecordError, match=rf"with its sliding_window {length - 1} the model is exact up to"):
            make_ready(0, RECORD, network.encoder, [network], 4096)

    def test_a_run_on_longer_groups_is_refused_before_it_starts(self, monkeypatch, tmp_path):
        options = FAMILIES["mistral"] | {"sliding_window": 64}
        path = tiny_config(tmp_path, write_rows(tmp_path / "rows.jsonl", text_rows(8)), model={"init": options})
        config = load_config(path, ["data.max_tokens_per_group=65"])
        with pytest.raises(ConfigError, match="got 65, but mistral with sliding_window 64 is exact up to 64 tokens"):
            make_network(config, make_model("mistral").encoder.tokenizer)


def test_a_window_of_another_family_sets_no_limit():
    """Qwen's configs name one that `use_sliding_window: false` switches off."""
    config = make_model("qwen2").model.config
    config.sliding_window = 4
    assert longest_path(config) is None
