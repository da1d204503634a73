"""The one error of cluster set-up."""

from __future__ import annotations

from raysandbox.errors import RaysandboxError

__all__ = ["ClusterError"]


class ClusterError(RaysandboxError):
    """A cluster command that can't be done as asked; nothing was left half open.

    Attributes:
        where: The file, certificate, port or process that it is about.
        what: What is wrong with it.
        remedy: What the operator can do.
    """

    def __init__(self, *, where: str, what: str, remedy: str = "") -> None:
        tail = f". To fix: {remedy}" if remedy else ""
        super().__init__(
            f"{where}: {what}{tail}", where=where, what=what, remedy=remedy
        )
        self.where, self.what, self.remedy = where, what, remedy
