"""The one exception that is shown to the user as a message, not as a traceback."""


class UserError(Exception):
    """The user's input is wrong; the command line prints the message and exits with 2.

    `message` says what is wrong and where; `remedy` says what to do about it.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.remedy}" if self.remedy else self.message
