"""The rival of the serving benchmark: the stock transformers model, one conversation a time or in padded batches.

    python bench/serving/stock.py MODEL    serve it at /v1/rewards, one conversation a time; prints its URL

Template, tokenizer, image processor and backbone are the stock ones; the head is the model's own module on the state
of the last token.
"""

import argparse
import base64
import io
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers
from PIL import Image

import bench  # noqa: F401  (the kernels' path)
from fastrm.evaluate.reward_model import RewardModel

_PAD = "<|image_pad|>"


class StockModel:
    """A Qwen2-VL or Qwen2.5-VL reward model in float32 on a CPU, as transformers computes it."""

    def __init__(self, folder: str):
        network = RewardModel.from_pretrained(folder, device="cpu", dtype="fp32", check_exactness=False).network
        self._head, self._encoder = network.score, network.encoder
        self._model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def rewards(self, conversations: Sequence[tuple[str, bytes, str]]) -> list[float]:
        """Return the rewards of (prompt, image, response)s, from one pass over all, padded to the longest."""
        encoder, tokenizer = self._encoder, self._encoder.tokenizer
        images = [Image.open(io.BytesIO(image)) for _, image, _ in conversations]
        inputs = encoder.vision.processor(images=images, return_tensors="pt")
        texts = []
        for (prompt, _, response), grid in zip(conversations, inputs["image_grid_thw"], strict=True):
            question = [{"type": "image"}, {"type": "text", "text": prompt}]
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
            count = int(grid.prod()) // encoder.vision.processor.merge_size**2
            texts.append(tokenizer.apply_chat_template(turns, tokenize=False).replace(_PAD, _PAD * count, 1))
        rows = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
        kinds = (rows["input_ids"] == tokenizer.convert_tokens_to_ids(_PAD)).int()
        hidden = self._model(**rows, **inputs, mm_token_type_ids=kinds, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(texts)), rows["attention_mask"].sum(1) - 1]  # (B, D)
        return self._head(last).flatten().tolist()


def make_app(model: StockModel):
    """Return an application that answers /v1/rewards, computing one conversation after another."""
    import threading

    from fastapi import FastAPI

    app, one_at_a_time = FastAPI(), threading.Lock()

    @app.post("/v1/rewards")
    def rewards(body: dict) -> dict:  # in one of the threads that FastAPI keeps for functions that wait
        found = []
        for group in body["groups"]:
            image = base64.b64decode(group["images"][0].partition(",")[2])
            with one_at_a_time:
                found.append([model.rewards([(group["prompt"], image, one)])[0] for one in group["responses"]])
        return {"rewards": found}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    arguments = parser.parse_args()
    import socket

    import uvicorn

    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(StockModel(arguments.model)), log_level="warning"))
    print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    server.run(sockets=[listening])


if __name__ == "__main__":
    main()
