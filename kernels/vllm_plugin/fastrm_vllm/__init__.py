"""A plugin of vLLM that serves fastrm's reward models with heads that vLLM does not know.

`fastrm export MODEL --out FOLDER --for vllm` writes a folder whose config.json names one of these architectures. The
`Whole` ones read more than the last token of a conversation, so that vLLM must compute it in one piece.
"""

ARCHITECTURES = tuple(
    f"Fastrm{kind}{family}ForSequenceClassification"
    for kind in ("", "Whole")
    for family in ("Llama", "Qwen2", "Qwen3", "Qwen2VL", "Qwen2_5_VL", "InternVL")
)


def register() -> None:
    """Make the architectures known to vLLM by name, so that the models are imported only where one is served."""
    from vllm import ModelRegistry

    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, f"fastrm_vllm.models:{architecture}")
