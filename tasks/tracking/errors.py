"""Why a request failed: the chain of exceptions behind one, and what to say of it."""

from collections.abc import Iterator


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it comes from, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
