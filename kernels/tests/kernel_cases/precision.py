"""The error budget of kernels: no worse than twice eager code of the same dtype, against float64."""

import torch


def assert_within_budget(names, ours, eager, truth):
    """abs(ours - truth) <= 2 * (max abs(eager - truth) + eps * max abs(truth)), finite, for each tensor.

    Args:
        names: of the tensors, for the message.
        ours, eager: tensors in the dtype under test.
        truth: the same in float64.
    """
    for name, a, b, exact in zip(names, ours, eager, truth, strict=True):
        assert a.shape == exact.shape, f"{name}: shape {tuple(a.shape)}, wanted {tuple(exact.shape)}"
        if not a.numel():
            continue
        assert torch.isfinite(a).all(), f"{name}: {int((~torch.isfinite(a)).sum())} of {a.numel()} not finite"
        exact = exact.cpu()
        error = (a.detach().double().cpu() - exact).abs()
        band = torch.finfo(a.dtype).eps * exact.abs().max()
        limit = 2 * ((b.detach().double().cpu() - exact).abs().max() + band)
        worst = int(error.argmax())
        place = tuple(map(int, torch.unravel_index(error.argmax(), a.shape)))
        assert error.flatten()[worst] <= limit, (
            f"{name}: error {error.flatten()[worst]:.3e} at {place}, wanted at most {limit:.3e}: "
            f"got {a.flatten()[worst]:.6g}, truth {exact.flatten()[worst]:.6g}"
        )
