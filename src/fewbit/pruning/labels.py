"""Which indices of which axes leave together: a union of labels, some of which have to stay."""

from collections.abc import Sequence

Axis = tuple[int, ...] | None  # a label for each index; None: none of them may leave
Axes = tuple[Axis, ...]  # of a tensor


class Labels:
    """Numbers that stand for indices; those united leave together, or stay together for a reason."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._reason: dict[int, str] = {}

    def fresh(self, size: int, reason: str | None = None) -> tuple[int, ...]:
        """Labels of an axis of that size; with a reason, all of them have to stay."""
        first = len(self._parent)
        labels = tuple(range(first, first + size))
        self._parent.extend(labels)
        if reason is not None:
            self._reason.update(dict.fromkeys(labels, reason))
        return labels

    def find(self, label: int) -> int:
        """The one label that stands for all that are united with it."""
        root = label
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[label] != root:
            self._parent[label], label = root, self._parent[label]
        return root

    def unite(self, first: int, second: int) -> None:
        a, b = sorted((self.find(first), self.find(second)))
        if a == b:
            return
        self._parent[b] = a
        reason = self._reason.pop(b, None)
        if reason is not None:
            self._reason.setdefault(a, reason)

    def unite_axes(self, first: Axis, second: Axis, reason: str) -> Axis:
        """Index by index; where only one of them has labels those stay, for the reason. Gives the common axis."""
        if first is None or second is None:
            self.freeze(first, reason)
            self.freeze(second, reason)
            return None
        for a, b in zip(first, second, strict=True):
            self.unite(a, b)
        return first

    def unite_all(self, labels: Sequence[int]) -> None:
        for label in labels[1:]:
            self.unite(labels[0], label)

    def freeze(self, axis: Axis, reason: str) -> None:
        """These have to stay. The first reason is kept."""
        for label in set(axis or ()):
            self._reason.setdefault(self.find(label), reason)

    def reason(self, label: int) -> str | None:
        """Why it has to stay, None where it may leave."""
        return self._reason.get(self.find(label))

    def units(self, groups: Sequence[Sequence[int]]) -> int:
        """How many could leave by themselves if the labels in each group were united."""
        trial = Labels()
        trial._parent = self._parent.copy()
        for group in groups:
            trial.unite_all(group)
        return len({trial.find(group[0]) for group in groups})
