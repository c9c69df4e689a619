"""custom_operator: a torch.library operator whose arguments are the fields of NamedTuples."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch import Tensor


def custom_operator(
    name: str, arguments: tuple[type[Any], ...], results: int, run: Callable[..., Any], fake: Callable[..., Any]
) -> Any:
    """Register an operator that torch.compile keeps as one node: op(*fields) -> a tuple of tensors.

    Args:
        name: "namespace::operator".
        arguments: NamedTuples; the fields of all of them, in order, are the operator's arguments and make its schema. A
            field that an earlier one has too is called <field>_of_<class>.
        results: how many tensors it returns, at least 2.
        run: computes them from one instance of each of `arguments`.
        fake: the same on fake tensors: shapes, dtypes and devices alone.

    Returns:
        The operator, for register_autograd.
    """
    types: dict[str, Any] = {}
    for group in arguments:
        for field, kind in get_type_hints(group).items():
            types[field if field not in types else f"{field}_of_{group.__name__}"] = kind

    def grouped(values: tuple[Any, ...]) -> list[Any]:
        groups, start = [], 0
        for group in arguments:
            stop = start + len(group._fields)  # type: ignore[attr-defined]
            groups.append(group(*values[start:stop]))
            start = stop
        return groups

    def operator(*values: Any) -> Any:
        return tuple(run(*grouped(values)))

    operator.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(field, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=types[field]) for field in types],
        return_annotation=tuple[(Tensor,) * results],  # type: ignore[misc]
    )
    registered = torch.library.custom_op(name, operator, mutates_args=())
    registered.register_fake(lambda *values: tuple(fake(*grouped(values))))
    return registered


def gradients_of(arguments: type[Any], **gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """What an operator's backward returns: the gradients given by name, None for every other argument."""
    return tuple(gradients.get(field) for field in arguments._fields)
