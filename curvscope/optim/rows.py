"""Tables that optimizers return: lists of dictionaries that print and turn into frames."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


class Rows(list[dict[str, Any]]):
    """A list of rows with the same keys; prints as an aligned table."""

    def to_frame(self) -> pd.DataFrame:
        """The rows as a pandas frame."""
        import pandas as pd

        return pd.DataFrame.from_records(list(self))

    def __str__(self) -> str:
        if not self:
            return "(no rows)"
        keys = list(dict.fromkeys(key for row in self for key in row))
        table = [keys, *([_text(row.get(key)) for key in keys] for row in self)]
        widths = [max(len(line[k]) for line in table) for k in range(len(keys))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
            for line in table
        )


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
