"""LSTM, GRU and plain recurrent layers, one step after the other: every run starts from the states it is given.

LiteRT's own operators keep their states from one run to the next unless the program that runs them resets them, so
the steps are written out. The products with the input are one layer for the whole sequence; what is left for a step
is the product with the state before.
"""

from typing import Any

import torch
from torch import Tensor

from fewbit.targets._litert.expand import Call, Expand, Value
from fewbit.targets._litert.floats_products import linear

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def _layer(kind: str) -> Expand:
    def expand(c: Call) -> list[Any]:
        return _Stack(c, kind).run()

    return expand


class _Stack:
    """All layers and directions of one recurrent module; inside, sequences are [N, T, features]."""

    def __init__(self, c: Call, kind: str) -> None:
        self.c, self.kind = c, kind
        self.config = c.op.attrs["config"]
        self.batched = c.x.rank == 3
        self.first = bool(self.config["batch_first"]) and self.batched
        self.hidden = int(self.config["hidden_size"])
        time = (1 if self.first else 0) if self.batched else 0
        if time in c.expansion.sizes.free.get(c.x.name, ()):
            raise c.error(
                "the length of its sequence is free: the first axis counts as the batch; use batch_first=True, "
                "or read the model with a fixed length (dynamic_shapes)"
            )

    def run(self) -> list[Any]:
        c = self.c
        x = self._batch_first(c.x)
        given = self._given()
        finals: list[list[Value]] = [[] for _ in given]
        directions = 2 if self.config["bidirectional"] else 1
        for index in range(int(self.config["num_layers"])):
            parts = []
            for backwards in range(directions):
                suffix = f"_l{index}{'_reverse' if backwards else ''}"
                states = [self._state(s, index * directions + backwards) for s in given]
                outputs, states = self._direction(x, suffix, states, bool(backwards))
                parts.append(outputs)
                for final, state in zip(finals, states, strict=True):
                    assert state is not None
                    final.append(state)
            x = parts[0] if directions == 1 else c("cat.default", parts, 2)
        states = [self._final(values) for values in finals]
        return [self._back(x), states if self.kind == "LSTM" else states[0]]

    # ---- in and out -------------------------------------------------------------------------------------------------

    def _batch_first(self, x: Value) -> Value:
        if not self.batched:
            return self.c("unsqueeze.default", x, 0)
        return x if self.first else self.c("transpose.int", x, 0, 1)

    def _back(self, x: Value) -> Value:
        if not self.batched:
            return self.c("squeeze.dims", x, [0])
        if self.first:
            return x
        turned = self.c("transpose.int", x, 0, 1)
        if x.name in self.c.expansion.sequences:
            self.c.expansion.sequences[turned.name] = (0, self.c.expansion.sequences[x.name][1])
        return turned

    def _given(self) -> list[Value | None]:
        """The initial states, [layers * directions, N, H] each; None where they are zero."""
        count = 2 if self.kind == "LSTM" else 1
        if len(self.c.args) < 2 or self.c.args[1] is None:
            return [None] * count
        return list(self.c.args[1]) if count == 2 else [self.c.args[1]]

    def _state(self, given: Value | None, at: int) -> Value | None:
        if given is None:
            return None
        state = self.c("select.int", given, 0, at)
        return state if self.batched else self.c("unsqueeze.default", state, 0)

    def _final(self, values: list[Value]) -> Value:
        c = self.c
        if self.batched:
            values = [c("unsqueeze.default", v, 0) for v in values]
        return values[0] if len(values) == 1 else c("cat.default", values, 0)

    # ---- one direction ----------------------------------------------------------------------------------------------

    def _direction(
        self, x: Value, suffix: str, states: list[Value | None], backwards: bool
    ) -> tuple[Value, list[Value | None]]:
        """The outputs [N, T, H] and the last states."""
        c, length = self.c, x.shape[1]
        of_input, of_state = self._biases(suffix)
        inputs = self._product(x, f"weight_ih{suffix}", of_input)
        width = inputs.shape[2]
        row = c("reshape.default", inputs, [-1, length * width])  # so that a step is a plain slice
        outputs: dict[int, Value] = {}
        for t in reversed(range(length)) if backwards else range(length):
            now = c("slice.Tensor", row, 1, t * width, (t + 1) * width, 1) if length > 1 else row
            before = states[0]
            carried = None if before is None else self._product(before, f"weight_hh{suffix}", of_state)
            if before is None and of_state is not None:
                carried = c.constant(of_state.reshape(1, -1))
            states = self._step(now, carried, states, suffix)
            result = states[0]
            assert result is not None
            outputs[t] = result
        steps = [outputs[t] for t in range(length)]
        joined = c("cat.default", steps, 1) if length > 1 else steps[0]
        sequence = c("reshape.default", joined, [-1, length, joined.shape[1] // length])
        c.expansion.sequences[sequence.name] = (1, steps)
        return sequence, states

    def _step(
        self, now: Value, carried: Value | None, states: list[Value | None], suffix: str
    ) -> list[Value | None]:
        if self.kind == "LSTM":
            return self._lstm(now, carried, states[1], suffix)
        if self.kind == "GRU":
            return [self._gru(now, carried, states[0])]
        function = "relu" if self.config["nonlinearity"] == "relu" else "tanh"
        return [self.c(f"{function}.default", self._sum(now, carried))]

    def _sum(self, now: Value, carried: Value | None) -> Value:
        return now if carried is None else self.c("add.Tensor", now, carried)

    def _lstm(self, now: Value, carried: Value | None, cell: Value | None, suffix: str) -> list[Value | None]:
        """Gates in the order i, f, o, g, so that one operator computes the first three."""
        c, h = self.c, self.hidden
        total = self._sum(now, carried)
        gates = c("sigmoid.default", self._part(total, 0, 3))
        i, f, o = (self._part(gates, k, k + 1) for k in range(3))
        new = c("mul.Tensor", i, c("tanh.default", self._part(total, 3, 4)))
        if cell is not None:
            new = c("add.Tensor", c("mul.Tensor", f, cell), new)
        out = c("mul.Tensor", o, c("tanh.default", new))
        if self.config.get("proj_size"):
            out = self._product(out, f"weight_hr{suffix}", None)
        assert h == new.shape[-1]
        return [out, new]

    def _gru(self, now: Value, carried: Value | None, before: Value | None) -> Value:
        """Gates r, z, n; r scales what the state (and its bias) contributes to n."""
        c = self.c
        if carried is None:
            z = c("sigmoid.default", self._part(now, 1, 2))
            n = c("tanh.default", self._part(now, 2, 3))
            return c("sub.Tensor", n, c("mul.Tensor", z, n))
        gates = c("sigmoid.default", c("add.Tensor", self._part(now, 0, 2), self._part(carried, 0, 2)))
        r, z = self._part(gates, 0, 1), self._part(gates, 1, 2)
        n = c("add.Tensor", self._part(now, 2, 3), c("mul.Tensor", r, self._part(carried, 2, 3)))
        n = c("tanh.default", n)
        if before is None:
            return c("sub.Tensor", n, c("mul.Tensor", z, n))
        return c("add.Tensor", n, c("mul.Tensor", z, c("sub.Tensor", before, n)))

    def _part(self, x: Value, start: int, end: int) -> Value:
        if (end - start) * self.hidden == x.shape[-1]:
            return x
        return self.c("slice.Tensor", x, 1, start * self.hidden, end * self.hidden, 1)

    # ---- parameters -------------------------------------------------------------------------------------------------

    def _order(self) -> list[int]:
        return [0, 1, 3, 2] if self.kind == "LSTM" else list(range(_GATES[self.kind]))

    def _biases(self, suffix: str) -> tuple[Tensor | None, Tensor | None]:
        """What is added to the product with the input, and to that with the state: joined but for the GRU."""
        if not self.config["bias"]:
            return None, None
        first, second = (self._gates(self.c.parameter(f"bias_{k}{suffix}")) for k in ("ih", "hh"))
        return (first, second) if self.kind == "GRU" else (first + second, None)

    def _gates(self, value: Tensor) -> Tensor:
        """Rows of a parameter with its blocks of gates in our order."""
        blocks = value.reshape(_GATES[self.kind], -1, *value.shape[1:])
        return blocks[self._order()].reshape(value.shape).contiguous()

    def _product(self, x: Value, name: str, bias: Tensor | None) -> Value:
        c = self.c
        gated = not name.startswith("weight_hr")
        weight = c.constants[name]
        if name not in c.op.attrs.get("schemes", {}):
            return linear(c, x, self._gates(weight) if gated else weight, bias)
        rows = torch.arange(weight.shape[0])
        return linear(c, x, weight, bias, source=name, rows=self._gates(rows) if gated else rows)


def _select(c: Call) -> Value | None:
    """One step of a sequence is the state that it was made of."""
    axis, steps = c.expansion.sequences.get(c.x.name, (-1, []))
    if not steps or c["dim"] % c.x.rank != axis:
        return None
    return steps[c["index"]]


RECURRENT: dict[str, Expand] = {f"module.{kind}": _layer(kind) for kind in _GATES}
RECURRENT["aten.select.int"] = _select
