"""What a run says before its first step: the model, how it computes, and the data."""

from collections.abc import Iterator

from fastrm.model.config_keys import describe_unknown_keys
from fastrm.model.stock_classes import padding_note
from fastrm.train.setup import Job


def opening_lines(job: Job, num_ranks: int, num_quarantined: int) -> Iterator[str]:
    """On the model, a line for each decision on how it computes, and the training data."""
    network, config, train = job.network, job.config, job.train
    # Of weights that are divided over ranks, this one holds a part.
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in network.parameters()]
    parameters, trainable = (sum(size for size, trained in sizes if trained or all) for all in (True, False))
    yield f"model: {parameters:,} parameters, {trainable:,} trained, on {network.device}"
    if (line := describe_unknown_keys(network.model.config)) is not None:
        yield line
    if num_ranks > 1:
        yield f"ranks: {num_ranks}, DeepSpeed ZeRO stage {config.engine.zero_stage}"
    for part, (choice, why) in (("attention", network.attention), ("head and loss", network.head_kernels)):
        yield f"{part}: {choice} ({why})"
    yield f"norm and SwiGLU: {network.norm_and_gate}"
    if network.fp8:
        yield from network.fp8.lines(config.compile == "layers")
    if (line := padding_note(network)) is not None:
        yield line
    yield (
        f"data: {len(train.groups):,} groups with {train.num_preferences:,} preferences from "
        f"{train.num_records:,} records; {train.num_ties_ignored:,} ties ignored; "
        f"{num_quarantined:,} records in quarantine"
    )
