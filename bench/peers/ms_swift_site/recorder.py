"""A plugin that ms-swift loads (`--external_plugins`): it writes down what the comparison needs, and changes one id.

`$RECORD` names the folder: `steps.jsonl` gets a line for each step with its loss, gradient norm and seconds, `batch.pt`
the inputs of the first forward pass, `facts.json` its tokens and the number of trained parameters. ms-swift's template
has the id of <|image_pad|> in the published vocabulary written into it; the small model has a vocabulary of its own, so
the id is taken from `$IMAGE_PAD`.
"""

import json
import os
import time
from pathlib import Path

import torch
from swift.callbacks import TrainerCallback, callbacks_map
from swift.template.templates.qwen import Qwen2VLTemplate

FOLDER = Path(os.environ["RECORD"])
INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")

Qwen2VLTemplate.image_token_id = int(os.environ["IMAGE_PAD"])


class Recorder(TrainerCallback):
    """A callback that takes the seconds from the end of a step to the end of the next, with the reading of data."""

    def on_train_begin(self, args, state, control, **kwargs):
        self._record_first_batch()
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.seconds, self.started = now - self.started, now

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            row = {"loss": logs["loss"], "grad_norm": logs["grad_norm"], "seconds": self.seconds}
            with (FOLDER / "steps.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")

    def _record_first_batch(self):
        compute_loss = self.trainer.compute_loss

        def recorded(model, inputs, **kwargs):
            if not (FOLDER / "batch.pt").exists():
                torch.save({name: inputs[name] for name in INPUTS}, FOLDER / "batch.pt")
                trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
                facts = {"trained": trained, "tokens": inputs["input_ids"].numel()}
                (FOLDER / "facts.json").write_text(json.dumps(facts) + "\n")
            return compute_loss(model, inputs, **kwargs)

        self.trainer.compute_loss = recorded


callbacks_map["recorder"] = Recorder
