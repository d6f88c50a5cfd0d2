"""Operators that ms-swift's environment lacks. Python imports this file by itself from a folder on PYTHONPATH.

ms-swift needs torchvision for Qwen2.5-VL's processors. Its wheel for a CPU build of torch does not load its C++
part, and then importing it fails on two operators that the processors never call.
"""

import torch

for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
