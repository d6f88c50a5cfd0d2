"""TRL's RewardTrainer as a variant of the benchmarks: its own tokenising, collating and training step.

Gradient checkpointing and bf16, which it switches on by default, are off, as they are for fastrm beside it.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from bench.training.workloads import take_gradients
from fastrm.config import OptimConfig
from fastrm.data.record import Record
from fastrm.model.network import RewardNetwork
from fastrm.train.optim import make_optimizer


class TrlStep:
    """RewardTrainer's training step on batches of records.

    Args:
        network: with a linear head without bias; its weights are copied.
        batches: the records of each step, a row for each of their preferences.
        optim: AdamW's settings.
        folder: for what the trainer might write.
    """

    name = "trl"

    def __init__(self, network: RewardNetwork, batches: Sequence[Sequence[Record]], optim: OptimConfig, folder: Path):
        from datasets import Dataset
        from transformers import AutoModelForSequenceClassification
        from trl import RewardConfig, RewardTrainer

        config = copy.deepcopy(network.model.config)
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        model.load_state_dict(network.state_dict())
        model.set_attn_implementation("sdpa")
        rows = [[row for record in batch for row in trl_rows(record)] for batch in batches]
        arguments = RewardConfig(
            str(folder), max_grad_norm=optim.max_grad_norm, max_length=None, gradient_checkpointing=False, bf16=False,
            use_cpu=True, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        self.trainer = RewardTrainer(
            model, arguments, train_dataset=Dataset.from_list([row for batch in rows for row in batch]),
            processing_class=network.encoder.tokenizer, optimizers=(make_optimizer(model, optim), None),
        )  # fmt: skip
        # `train()` sets this attribute, which `training_step` reads.
        self.trainer.current_gradient_accumulation_steps = 1
        encoded = iter(self.trainer.train_dataset)
        self.batches = [self.trainer.data_collator([next(encoded) for _ in batch]) for batch in rows]

    def step(self, number: int) -> None:
        model, optimizer = self.trainer.model, self.trainer.optimizer
        self._backward(number)
        clip_grad_norm_(model.parameters(), self.trainer.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def gradients(self, number: int) -> tuple[float, dict[str, torch.Tensor]]:
        return float(self._backward(number)), take_gradients(self.trainer.model)

    def num_tokens(self, number: int) -> int:
        return self._batch(number)["input_ids"].numel()

    def _backward(self, number: int) -> torch.Tensor:
        return self.trainer.training_step(self.trainer.model, dict(self._batch(number)))

    def _batch(self, number: int) -> dict[str, torch.Tensor]:
        return self.batches[number % len(self.batches)]


def trl_rows(record: Record) -> list[dict]:
    """Return a record's preferences as TRL's conversational rows, in order."""
    return [
        {"chosen": _turns(record, preference.winner), "rejected": _turns(record, preference.loser)}
        for preference in record.preferences
    ]


def _turns(record: Record, response: int) -> list[dict]:
    return [{"role": message.role, "content": message.text} for message in record.responses[response].messages]
