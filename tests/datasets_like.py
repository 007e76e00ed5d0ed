"""What is used of a `datasets.Dataset`, for the package is optional."""

from __future__ import annotations

from types import SimpleNamespace

KINDS = {str: "string", int: "int64", float: "float64", type(None): "null"}


class Rows:
    """A data set in memory, by its columns; lists stand for features without a type of their own."""

    def __init__(self, /, **columns: list) -> None:
        self.columns = columns

    @property
    def features(self) -> dict:
        return {
            name: SimpleNamespace(dtype=KINDS[type(rows[0])]) if type(rows[0]) in KINDS else rows[:0]
            for name, rows in self.columns.items()
        }

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def __len__(self) -> int:
        return max(map(len, self.columns.values()))

    def __getitem__(self, rows: slice) -> dict[str, list]:
        return {name: values[rows] for name, values in self.columns.items()}
