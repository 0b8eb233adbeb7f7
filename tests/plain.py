"""What several tests compare with: plain PyTorch, and NumPy in float64. Of the engine it takes the
order of the examples and their augmentation, which test_engine.py compares with other things."""

import numpy as np
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from conftest import digits
from torch import Tensor, nn

import common
import engine


def network(state: dict, masks: dict | None = None, width: int = 4) -> nn.Module:
    """A saved ResNet-8 in float64 and eval mode, under masks by PyTorch's own pruning."""
    module = common.ResNet(8, width, 1, 10)
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected and all(k.endswith("num_batches_tracked") for k in missing)
    for name, mask in (masks or {}).items():
        torch.nn.utils.prune.custom_from_mask(module.get_submodule(name), "weight", mask)
    return module.double().eval()


def images(data: engine.Data, of: Tensor) -> Tensor:
    """(N, H, W, C) uint8 -> (N, C, H, W) float64, normalised."""
    return (of.double() * data.scale.double() + data.shift.double()).permute(0, 3, 1, 2)


def logits(module: nn.Module, of: Tensor, data: engine.Data | None = None) -> np.ndarray:
    with torch.no_grad():
        return module(images(data or digits(), of)).numpy()


def losses(z: np.ndarray, labels: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cross-entropy, 0-1 error and EL2N norm of logits (N, C), by their formulas."""
    z, y = np.asarray(z, np.float64), np.asarray(labels)
    e = np.exp(z - z.max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True)
    loss = np.log(e.sum(1)) - (z[np.arange(len(y)), y] - z.max(1))
    norm = np.linalg.norm(p - np.eye(z.shape[1])[y], axis=1)
    return loss, (z.argmax(1) != y).astype(float), norm


def accuracy(module: nn.Module) -> float:
    """On the test images of the digits."""
    data = digits()
    return 1 - losses(logits(module, data.test_images), data.test_labels)[1].mean()


def train(module, data, stream, lrs, weight_decay: float, masks: dict | None = None) -> None:
    """torch.optim.SGD with momentum 0.9 on batches of 32, a step for each rate of `lrs`; `masks`:
    weight -> what it is multiplied with after every step."""
    optimizer = torch.optim.SGD(module.parameters(), 0.1, 0.9, 0, weight_decay)
    for step, lr in enumerate(lrs):
        optimizer.param_groups[0]["lr"] = lr
        i = engine.batch_indices(stream, step, step + 1, 32)[0]
        [crops] = engine.draw_crops(stream.augment, step, step + 1, 32, 1, False, i.device)
        x = engine.augment(data.train_images, i, crops, data.scale, data.shift)
        optimizer.zero_grad()
        F.cross_entropy(module(x), stream.labels[i]).backward()
        optimizer.step()
        with torch.no_grad():
            for weight, mask in (masks or {}).items():
                weight.mul_(mask)
