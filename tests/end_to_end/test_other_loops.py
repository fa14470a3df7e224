"""The trainable model in other people's training loops: Lightning, Hugging Face's Trainer, Accelerate; TensorBoard."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_training import FEW, accuracy, digits, network
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fewbit
from fewbit.training.groups import parameter_groups


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    images, labels, _, _ = digits()
    return fewbit.finetune(network(), (images, labels), epochs=6, batch_size=32, lr=3e-3, teacher=None)


def trainable(trained: nn.Module) -> Any:
    return fewbit.quantize(trained, digits()[0][:256], trainable=True, **FEW)


def finished(q: Any, trained: nn.Module, folder: Path) -> None:
    """What it learned is what is deployed."""
    start = accuracy(fewbit.quantize(trained, digits()[0][:256], recipe=fewbit.Recipe(**FEW)))
    q.eval()
    assert accuracy(q) > start + 0.05
    assert fewbit.export(q, folder / "q.onnx", time=False).verification.exact
    held = digits()[2]
    with torch.no_grad():
        assert torch.equal(q(held), q.convert()(held))


def test_lightning(trained: nn.Module, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    q = trainable(trained)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.q = q

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.q(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(parameter_groups(self.q, 2e-3))

    images, labels, _, _ = digits()
    trainer = lightning.Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=True, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(TensorDataset(images, labels), 32, shuffle=True))
    finished(q, trained, tmp_path)


def test_hugging_face(trained: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    q = trainable(trained)

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = q

        def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
            found = self.q(images)
            return {"loss": F.cross_entropy(found, labels), "logits": found}

    class Samples(Dataset[Any]):
        def __len__(self) -> int:
            return 1300

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            images, labels = data
            return {"images": images[i], "labels": labels[i]}

    data = digits()[:2]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "hf"), num_train_epochs=4, per_device_train_batch_size=32, learning_rate=2e-3, report_to=[],
        save_strategy="epoch", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(WithLoss(), arguments, train_dataset=Samples())
    trainer.train()
    finished(q, trained, tmp_path)


def test_accelerate(trained: nn.Module, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    images, labels, _, _ = digits()
    q = trainable(trained)
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(parameter_groups(q, 2e-3))
    loader = DataLoader(TensorDataset(images, labels), 32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(q, optimizer, loader)
    for _ in range(4):
        for x, y in loader:
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    finished(accelerator.unwrap_model(model), trained, tmp_path)


def test_tensorboard(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    images, labels, _, _ = digits()
    fewbit.finetune(network(), (images, labels), epochs=3, teacher=None, folder=tmp_path)
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
