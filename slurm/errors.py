"""The one exception for faults of a submission that a user can mend."""

from __future__ import annotations


class SlurmError(Exception):
    """A fault in a cluster profile, a job or the surroundings, not in the program.

    The command line prints it without a traceback and exits with code 2.

    Args:
        what: What is wrong, one sentence without a trailing full stop.
        where: The file and key, or the job, in which it was found.
        todo: What the user can do about it.
    """

    def __init__(self, what: str, where: str = "", todo: str = "") -> None:
        super().__init__(what, where, todo)
        self.what, self.where, self.todo = what, where, todo

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  -> {self.todo}" if self.todo else text
