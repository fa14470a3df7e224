"""All linear layers of a PyTorch model become int8, without calibration data: saved, loaded, run."""

from collections.abc import Sequence

import torch
from pictures import arguments, load
from safetensors.torch import save_file
from torch import Tensor, nn

import fewbit


class RowsAsWords(nn.Module):
    """A transformer that reads a picture row by row."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.embed = nn.Linear(columns, 128)
        self.place = nn.Parameter(0.02 * torch.randn(rows, 128))
        layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, activation="gelu", batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x) + self.place).mean(1))


def trained(x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    model = RowsAsWords(*x.shape[1:])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model.eval()


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    options = arguments(__doc__ or "", argv)
    torch.manual_seed(0)
    (x, y), test = (
        (torch.from_numpy(i[..., 0]) / 255, torch.from_numpy(n)) for i, n in load("mnist", options.data)
    )
    limit = 640 if options.quick else 20000
    model = trained(x[:limit], y[:limit], epochs=1)

    quantized = fewbit.quantize(model, example=x[:4], activations="dynamic")
    folder = fewbit.save(quantized, options.output / "rows.int8")
    loaded = fewbit.load(folder)

    assert torch.equal(loaded(x[:64]), quantized(x[:64]))
    save_file(model.state_dict(), options.output / "rows.safetensors")
    floating = (options.output / "rows.safetensors").stat().st_size
    stored = (folder / "model.safetensors").stat().st_size
    linear = [row.layer for row in loaded.plan.rows if row.kind == "weight" and row.scheme]
    print(f"{len(linear)} linear layers in int8: {', '.join(linear)}")
    print(f"weights: {floating:,} bytes in float32, {stored:,} quantized: {stored / floating:.3f} of it")
    artifact = fewbit.export(loaded, options.output / "rows.int8.onnx")
    print(artifact)
    part = tuple(t[: limit // 4] for t in test)
    report = fewbit.evaluate(loaded, part, ["accuracy"], baseline=model)
    print(report)
    return {"layers": len(linear), "ratio": stored / floating}


if __name__ == "__main__":
    main()
