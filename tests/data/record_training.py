"""Record some training runs done by hand in PyTorch: the reference of tests/finetune/test_reference.py.

Purpose: losses and final weights from an implementation that shares no code with this project: transformers' Gemma,
PyTorch's gradients, and below, written out from their definitions, the order of sequences, the accumulated loss,
the schedule, clipping, Keras' AdamW and LoRA. Nothing is packed here: each piece of a packed row is run by itself from
position 0, which is what packing has to amount to. Run by hand, never by the tests; again when a case in
tests/support/training_cases.py changes.
Writes: tests/data/reference_training.npz: for each case `losses`, `targets` and `learning_rates` (one per step),
`validation_losses` (one per epoch, and one after the last step), and `trained/<name>`, each trained weight at the end.
Command (from the repository, in an environment of its own with torch, transformers and numpy at the versions of
requirements-benchmarks.txt; a CPU will do): `python -m tests.data.record_training`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers

from tests.support.training_cases import (
    CASES,
    CONFIGS,
    HEAD,
    HEADS,
    PROJECTIONS,
    RECORDED,
    Case,
    first_adapter,
    first_weights,
    sequences,
)

Arrays = dict[str, np.ndarray]
Parameters = dict[str, torch.Tensor]


def main() -> None:
    """Train each case and write the file."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    recorded: Arrays = {
        "versions": np.array([f"torch {torch.__version__}", f"transformers {transformers.__version__}"])
    }
    for name, case in CASES.items():
        for key, value in train(case).items():
            recorded[f"{name}/{key}"] = value
        print(name, np.round(recorded[f"{name}/losses"], 4).tolist(), recorded[f"{name}/targets"].tolist(), flush=True)
    with RECORDED.open("wb") as stream:
        np.savez_compressed(stream, **recorded)


def train(case: Case) -> Arrays:
    """Train a case and return what is recorded of it."""
    settings, data = case.settings, sequences(case)
    config = transformers.AutoConfig.for_model(**CONFIGS[case.family])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    left_out = model.load_state_dict(
        {name: torch.tensor(each) for name, each in first_weights(case.family).items()}, strict=False
    )
    assert (left_out.missing_keys, left_out.unexpected_keys) == (["lm_head.weight"], []), left_out
    model.tie_weights()
    if settings["rank"]:
        trained = {path: torch.tensor(each, requires_grad=True) for path, each in first_adapter(case).items()}
        model.requires_grad_(False)
        adapt(model, trained, settings["alpha"] / settings["rank"])
    else:
        trained = dict(model.named_parameters())

    groups = order(case, len(data["train"]["token_ids"]))
    optimizer = AdamW(trained, settings, len(groups))
    found: dict[str, list[float]] = {"losses": [], "targets": [], "learning_rates": [], "validation_losses": []}
    for step, (batches, epoch_ends) in enumerate(groups):
        rows = [row for batch in batches for row in batch]
        total = float(data["train"]["weights"][rows].sum())
        loss = 0.0
        for batch in batches:
            # The gradients of the batches add up in `.grad`.
            part = weighted_loss(model, data["train"], batch) / total
            part.backward()
            loss += float(part.detach())
        found["losses"].append(loss)
        found["targets"].append(total)
        found["learning_rates"].append(optimizer.learning_rate(step))
        optimizer.update(step)
        if epoch_ends or step == len(groups) - 1:
            held_out = data["validation"]
            with torch.no_grad():
                summed = float(weighted_loss(model, held_out, range(len(held_out["weights"]))))
            found["validation_losses"].append(summed / float(held_out["weights"].sum()))
    return {name: np.array(values) for name, values in found.items()} | {
        f"trained/{name}": each.detach().numpy() for name, each in trained.items()
    }


def order(case: Case, count: int) -> list[tuple[list[list[int]], bool]]:
    """Return the batches of each step (rows of each), and whether an epoch ends with the step.

    Each epoch is shuffled by NumPy's generator of (seed, epoch); batches and groups end with the epoch.
    """
    size, together = case.settings["batch_size"], case.settings["gradient_accumulation"]
    steps = []
    for epoch in range(case.settings["epochs"]):
        rows = np.random.default_rng([case.settings["seed"], epoch]).permutation(count).tolist()
        batches = [rows[start : start + size] for start in range(0, count, size)]
        groups = [batches[start : start + together] for start in range(0, len(batches), together)]
        steps += [(group, group is groups[-1]) for group in groups]
    return steps[: case.settings["steps"]]


def weighted_loss(model: torch.nn.Module, data: Arrays, rows: Sequence[int]) -> torch.Tensor:
    """Return the sum over the rows' tokens of weight x cross-entropy, each piece of a row run by itself."""
    losses = []
    for row in rows:
        segments = data["segment_ids"][row] if "segment_ids" in data else np.ones_like(data["token_ids"][row])
        for segment in np.unique(segments[segments > 0]):
            piece = segments == segment
            inputs, targets = (torch.tensor(data[name][row, piece]).long() for name in ("token_ids", "target_ids"))
            logits = model(input_ids=inputs[None]).logits[0]
            each = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
            losses.append((each * torch.tensor(data["weights"][row, piece])).sum())
    return torch.stack(losses).sum()


def adapt(model: torch.nn.Module, adapter: Parameters, scale: float) -> None:
    """Add scale x A B to what each adapted projection returns: by heads where A has them."""

    def added(path: str, a: torch.Tensor, b: torch.Tensor) -> Callable[..., torch.Tensor]:
        def hook(_: torch.nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
            (x,) = arguments
            if path.endswith("attention_output"):
                heads = x.unflatten(-1, (HEADS, HEAD))
                wide = torch.einsum("btnh,nhr->btr", heads, a) @ b
            elif path.startswith("attention/"):
                wide = (torch.einsum("btd,ndr->btnr", x, a) @ b).flatten(2)
            else:
                wide = x @ a @ b
            return output + scale * wide

        return hook

    for block, layer in enumerate(model.model.layers):
        for path, name in PROJECTIONS.items():
            base = f"decoder_block_{block}/{path}/lora_kernel"
            if f"{base}_a" in adapter:
                hook = added(path, adapter[f"{base}_a"], adapter[f"{base}_b"])
                layer.get_submodule(name).register_forward_hook(hook)


class AdamW:
    """Keras' AdamW by its formulas: decay first and apart from the moments, epsilon outside the bias correction.

    Sources: https://arxiv.org/abs/1412.6980 (the form at the end of its section 2), https://arxiv.org/abs/1711.05101.
    """

    def __init__(self, trained: Parameters, settings: dict[str, Any], steps: int) -> None:
        """Take the weights, which are changed in place, and the steps of the whole run."""
        self._trained, self._settings, self._steps = trained, settings, steps
        self._means = {name: torch.zeros_like(each) for name, each in trained.items()}
        self._squares = {name: torch.zeros_like(each) for name, each in trained.items()}

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        peak, warmup = self._settings["learning_rate"], self._settings["warmup_steps"]
        if step < warmup:
            return peak * (step + 1) / warmup
        part = (step - warmup) / (self._steps - warmup)
        return (
            peak
            * {"constant": 1.0, "linear": 1.0 - part, "cosine": (1.0 + math.cos(math.pi * part)) / 2}[
                self._settings["schedule"]
            ]
        )

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Change the weights by their gradients, which are then empty."""
        settings, rate, t = self._settings, self.learning_rate(step), step + 1
        beta_1, beta_2 = settings["beta_1"], settings["beta_2"]
        corrected = rate * math.sqrt(1 - beta_2**t) / (1 - beta_1**t)
        norm = math.sqrt(sum(float(each.grad.double().square().sum()) for each in self._trained.values()))
        clip = settings["clip_norm"]
        kept = 1.0 if clip is None or norm <= clip else clip / norm
        for name, weight in self._trained.items():
            gradient, mean, square = weight.grad * kept, self._means[name], self._squares[name]
            if "norm" not in name:
                weight -= rate * settings["weight_decay"] * weight
            mean += (1 - beta_1) * (gradient - mean)
            square += (1 - beta_2) * (gradient.square() - square)
            weight -= corrected * mean / (square.sqrt() + settings["epsilon"])
            weight.grad = None


if __name__ == "__main__":
    main()
