"""The result of one of the doctor's checks."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARN, FAIL = "OK", "WARN", "FAIL"


@dataclass(frozen=True)
class Finding:
    """status: OK, WARN (a run may still work) or FAIL (it will not)."""

    check: str
    status: str
    text: str
    remedy: str = ""

    def line(self) -> str:
        return f"{self.status:<4}  {self.check:<14} {self.text}" + (f"\n      {'':<14} -> {self.remedy}" if self.remedy else "")
