"""What families of text models have beside the layers that all of them share."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from fastrm.config import ModelConfig, TrainedTokenizer, load_config
from fastrm.errors import ConfigError, RecordError, StorageError
from fastrm.evaluate.scoring import make_ready
from fastrm.forecast.fake_step import FakeSteps
from fastrm.forecast.flops import step_flops
from fastrm.forecast.workload import Workload
from fastrm.lora_config import LoraConfig
from fastrm.model.architectures import find_architecture, meta_network
from fastrm.model.export import save_model
from fastrm.model.families import check_family
from fastrm.model.loading import load_backbone
from fastrm.model.lora import add_lora
from fastrm.model.precision import convert_to_fp8
from fastrm.model.text import longest_path
from fastrm.train.optim import make_optimizers
from fastrm.train.setup import make_network
from fastrm.train.step_cost import make_cost_model
from tests.helpers import stock
from tests.helpers.runs import text_rows, tiny_config, write_rows
from tests.helpers.stock import save_stock_checkpoint
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


MOE = ["qwen2_moe", "qwen3_moe"]


@pytest.mark.parametrize("family", MOE)
class TestExperts:
    def test_published_names_load_and_are_written_as_transformers_does(self, family, tmp_path):
        network = make_model(family)
        save_stock_checkpoint(tmp_path / "stock", network, torch.float32)
        names = load_file(tmp_path / "stock" / "model.safetensors").keys()
        assert any(name.endswith("layers.2.mlp.experts.4.up_proj.weight") for name in names)
        loaded = load_backbone(str(tmp_path / "stock")).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in network.model.state_dict().items())
        save_model(network, tmp_path / "ours")
        ours = load_file(tmp_path / "ours" / "model.safetensors")
        wanted = load_file(tmp_path / "stock" / "model.safetensors")
        assert ours.keys() - {name for name in ours if name.startswith("score")} == wanted.keys() - {"lm_head.weight"}
        assert all(torch.equal(ours[name], wanted[name]) for name in ours.keys() & wanted.keys())

    def test_a_matrix_of_an_expert_that_is_missing_is_named(self, family, tmp_path):
        save_stock_checkpoint(tmp_path, make_model(family), torch.float32)
        file = tmp_path / "model.safetensors"
        state = load_file(file)
        del state["model.layers.2.mlp.experts.3.up_proj.weight"]
        save_file(state, file, {"format": "pt"})
        with pytest.raises(StorageError, match=r"first: layers\.2\.mlp\.experts\.gate_up_proj is missing"):
            load_backbone(str(tmp_path))

    def test_a_step_with_8_bit__all_experts_and_decays_them(self, family, tmp_path):
        network, path = make_model(family), tiny_config(tmp_path, tmp_path / "rows.jsonl")
        optimizers = make_optimizers(network, load_config(path, ["optim.states=8bit", "optim.weight_decay=0.1"]))
        decays = {id(p): g["weight_decay"] for o in optimizers for g in o.param_groups for p in g["params"]}
        experts = [p for name, p in network.named_parameters() if ".experts." in name]
        assert len(experts) == 4 and all(decays[id(p)] == 0.1 for p in experts)
        before = [p.detach().clone() for p in experts]
        network(pack_of(network, [make_record(n) for n in range(6)])).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        assert not any(torch.equal(p, old) for p, old in zip(experts, before, strict=True))

    def test_compiled_layers_and_recomputation_change_nothing(self, family, one_thread):
        network, records = make_model(family), [make_record(1, num_responses=3), make_record(2)]
        wanted = _gradients(network, records)
        network.use_activation_checkpointing("selective")
        for name, gradient in _gradients(network, records).items():
            assert torch.equal(gradient, wanted[name]), name
        network.use_activation_checkpointing("none")
        network.compile_layers("aot_eager")
        network.set_kernels(torch.float32, attention="sdpa")
        for name, gradient in _gradients(network, records).items():
            assert (gradient - wanted[name]).abs().max() <= 1e-5 * max(1, wanted[name].abs().max()), name

    def test_lora_is_refused(self, family):
        with pytest.raises(ConfigError, match=f"model.lora: {family} has experts, .* train it whole"):
            add_lora(make_model(family), LoraConfig())

    def test_fp8_is_refused(self, family):
        with pytest.raises(ConfigError, match=f"the experts of {family} are no linear layers"):
            convert_to_fp8(make_model(family), "rowwise", emulate=True)

    def test_a_plan_of_memory_is_refused(self, family):
        with pytest.raises(ConfigError, match=f"{family}: the memory of experts cannot be planned"):
            FakeSteps(make_model(family))

    def test_more_experts_for_a_token_than_there_are_is_refused(self, family):
        options = FAMILIES[family] | {"num_experts_per_tok": 9}
        with pytest.raises(ConfigError, match=rf"{family}: num_experts_per_tok is 9, wanted 1 to num_experts, \d"):
            check_family(AutoConfig.for_model(**options))

    def test_operations_are_those_of_the_experts_that_a_token_goes_through(self, family):
        options = FAMILIES[family]
        all_of_them = options | {"num_experts_per_tok": options["num_experts"]}
        few, many = (_costs(made) for made in (options, all_of_them))
        spared = options["num_experts"] - options["num_experts_per_tok"]
        # Layer 0 for tokens; 2 forward, 4 backward for each element of three matrices.
        per_token = 6 * spared * 3 * options["hidden_size"] * options["moe_intermediate_size"]
        assert many[0] - few[0] == per_token
        load = Workload(1, 0, 50, 20)
        assert many[1] - few[1] == per_token * (load.num_tokens(True) + 2), "and layer 2 for the anchors"


@pytest.fixture
def one_thread():
    """Several threads add the gradients of the stock experts in no fixed order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _gradients(network, records):
    network.zero_grad(set_to_none=True)
    network(pack_of(network, records)).square().sum().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def _costs(options) -> tuple[float, int]:
    """FLOPs of a token by the cost model, and of the language model's matrices in a step of one pair."""
    settings = ModelConfig(init=options, tokenizer=TrainedTokenizer(train_vocab_size=300))
    config, _ = find_architecture(settings)
    way = {"shared": True, "images_once": True, "pruned": True, "checkpointing": False}
    flops = step_flops(meta_network(config, settings), Workload(1, 0, 50, 20), **way)
    return make_cost_model(config, settings).per_token, flops["language"].total
