"""Losses that users bring: preference_kind declares a function, kind_of finds the Kind of any name, built in or not.

A function's name is "module:qualname", by which PreferenceLoss refers to it, in JSON, in pickles and in checkpoints.
This process knows the functions that it was given, others import them by name. A function that its name does not
bring back (a lambda, one defined in another, a partial, a later one of the same name) is known to this process alone.

admit() tries a function on made-up rows, once for each loss, and says what is wrong with it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor

from dpofast.common.autograd import recording
from dpofast.common.names import did_you_mean
from dpofast.losses.columns import NO_COLUMNS, PreferenceColumns
from dpofast.losses.kinds import KINDS, SMOOTHING_RANGES, Kind
from dpofast.losses.options import LossOptions
from dpofast.losses.pairs import Lists, Pairs, StepTotals, make_lists

_DECLARATION = "preference_kind"
_Function = TypeVar("_Function", bound=Callable[..., Any])


class _NoLoss(ValueError):
    """A function of one's own returned something else than a loss for every row."""


@dataclass(frozen=True)
class _OwnKind:
    function: Callable[..., Any]
    kind: Kind


_OWN: dict[str, _OwnKind] = {}
_ADMITTED: set[tuple[str, str]] = set()
_FOLDERS: list[str] = []


def preference_kind(
    *function: Any,
    reference: bool = True,
    lengths: bool = False,
    coupled: bool = False,
    lists: bool = False,
    scores: bool = False,
    margin: bool = False,
    divergence: bool = False,
    smoothing: str | None = None,
    options: Sequence[str] = (),
) -> Callable[[_Function], _Function]:
    """Decorator that declares what a loss of your own reads; without it the defaults hold. docs/own_loss.md.

    The function is (Pairs, LossOptions) -> (P,) losses in nats, in the dtype of the log-probs; PreferenceLoss(kind=it).

    Args:
        reference: whether it reads reference log-probs (ref_chosen, chosen, ...; of lists ref and rewards).
        lengths: whether it reads token counts, which are NaN otherwise.
        coupled: whether a row's loss depends on other rows. The trainer then computes it over the whole step.
        lists: it is (Lists, LossOptions) -> (P,), for rankings; pairs come as lists of two.
        scores: of a loss of lists: it needs scores, so pairs, which have none, are refused. Without it Lists.scores is
            None where there are none.
        margin: whether it reads the column `margin` (Pairs.offset, which Pairs.margin() subtracts).
        divergence: whether f_divergence_type changes it (Pairs.scores(), margin(), mean_scores()).
        smoothing: the range of label_smoothing, "[0, 0.5]", "[0, 0.5)" or "(0, 1)"; None: it reads none.
        options: the options of other kinds that it reads, such as "simpo_gamma".

    Raises:
        ValueError: a range or an option that there is not, scores without lists, or of a loss of lists what Pairs alone
            have: margin, divergence, smoothing.
        TypeError: used without parentheses.
    """
    if function:
        raise TypeError(
            "preference_kind: expected what the function declares, by name and in parentheses: @preference_kind(...) "
            f"or @preference_kind(), got {function[0]!r}"
        )
    if smoothing is not None and smoothing not in SMOOTHING_RANGES:
        raise ValueError(f"smoothing: expected one of {list(SMOOTHING_RANGES)} or None, got {smoothing!r}")
    names = sorted({name for kind in KINDS.values() for name in kind.options})
    unknown = [name for name in options if name not in names]
    if isinstance(options, str) or unknown:
        raise ValueError(f"options: expected some of {names}, got {options!r}")
    if scores and not lists:
        raise ValueError("scores: belong to the responses of a list: declare lists=True too")
    of_pairs = {"margin": margin, "divergence": divergence, "smoothing": smoothing}
    if lists and any(of_pairs.values()):
        told = ", ".join(f"{name}={value!r}" for name, value in of_pairs.items() if value)
        raise ValueError(f"{told}: only Pairs have it, and with lists=True the function gets Lists: leave it out")
    declared = {
        **{"reference": reference, "lengths": lengths, "coupled": coupled, "lists": lists, "scores": scores},
        **{"margin": margin, "divergence": divergence, "smoothing": smoothing, "options": tuple(options)},
    }

    def declare(function: _Function) -> _Function:
        setattr(function, _DECLARATION, declared)
        return function

    return declare


def kind_of(name: str) -> Kind:
    """The Kind of a name: built in, or a function of one's own, which is imported where it is not known yet.

    Raises:
        ValueError: a function that cannot be imported here.
    """
    if name in KINDS:
        return KINDS[name]
    if name not in _OWN:
        _OWN[name] = _own(name, _imported(name))
    return _OWN[name].kind


def is_own(name: Any) -> bool:
    """Whether a name is that of a function of one's own, known or to be imported."""
    return isinstance(name, str) and ":" in name


def name_of(kind: Any) -> Any:
    """The name of a function, by which kind_of finds it from now on; anything else as it is."""
    if isinstance(kind, str) or not callable(kind):
        return kind
    module, _, qualname = _plain_name(kind).partition(":")
    name, count = f"{module}:{qualname}", 1
    found = _found(sys.modules.get(module), qualname)
    while True:
        known = _OWN.get(name)
        # A name that brings another function back, here or where it is imported, would mix the two up.
        if known is None and (count > 1 or found is None or found is kind):
            _OWN[name] = _own(name, kind)
            return name
        if known is not None and _same(known.function, kind):
            return name
        count += 1
        name = f"{module}:{qualname}#{count}"


def import_from(folder: str) -> None:
    """Look for the modules of functions in this folder too, after all others: the command line's current one."""
    if folder not in _FOLDERS:
        _FOLDERS.append(folder)


def _plain_name(function: Any) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def _same(one: Any, other: Any) -> bool:
    """Whether two functions of one name are one: the same object, or made again by a notebook's cell that ran twice."""
    if one is other or (isinstance(one, MethodType) and one == other):
        return True
    if not (isinstance(one, FunctionType) and isinstance(other, FunctionType)):
        return False
    plain = all(f.__closure__ is None and not f.__defaults__ and not f.__kwdefaults__ for f in (one, other))
    alike = one.__code__ == other.__code__ and one.__globals__ is other.__globals__
    return plain and alike and getattr(one, _DECLARATION, None) == getattr(other, _DECLARATION, None)


def _found(module: Any, qualname: str) -> Any:
    for part in qualname.split("."):
        module = getattr(module, part, None)
    return module


def _imported(name: str) -> Callable[..., Any]:
    module_name, _, qualname = name.partition(":")
    if not module_name or not qualname:
        raise ValueError(f"kind: expected module:function, got {name!r}")
    if "#" in name or "<" in name:
        raise ValueError(
            f"kind: {name!r} is known only to the process that made it: define it at the top level of a module, once, "
            "where another process can import it"
        )
    try:
        with _more_folders():
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(f"kind: {name!r}: its module cannot be imported: {error}") from error
        where = f", nor in {', '.join(_FOLDERS)}" if _FOLDERS else ""
        raise ValueError(
            f"kind: {name!r}: there is no module {module_name!r} where Python looks for modules (sys.path){where}"
        ) from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"kind: {name!r}: its module cannot be imported: {_said(error)}") from error
    function = _found(module, qualname)
    if not callable(function):
        functions = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        raise ValueError(
            f"kind: {name!r}: expected a function {qualname!r} in {module_name!r}, which has "
            f"{'none of that name' if function is None else 'no function by it'}{did_you_mean(qualname, functions)}"
        )
    return function


@contextmanager
def _more_folders() -> Iterator[None]:
    # Only here, and last: a folder called wandb or a file called random.py must not pass for a package.
    added = [folder for folder in _FOLDERS if folder not in sys.path]
    sys.path.extend(added)
    try:
        yield
    finally:
        for folder in added:
            sys.path.remove(folder)


def _own(name: str, function: Callable[..., Any]) -> _OwnKind:
    declared = getattr(function, _DECLARATION, {})
    return _OwnKind(function, Kind(partial(_checked, name, function), **declared))


def _checked(name: str, function: Callable[..., Any], x: Pairs | Lists, loss: LossOptions) -> Tensor:
    """What the function returns, if it is a loss for every row."""
    losses = function(x, loss)
    policy = x.policy_chosen if isinstance(x, Pairs) else x.policy
    if not isinstance(losses, Tensor):
        raise _NoLoss(f"kind: {name}: expected a tensor of one loss a row, got {type(losses).__name__}")
    if losses.shape != policy.shape[:1]:
        raise _NoLoss(
            f"kind: {name}: expected one loss a row, shape {tuple(policy.shape[:1])}, got {tuple(losses.shape)}: the "
            "mean over rows is taken later"
        )
    if losses.dtype != policy.dtype:
        raise _NoLoss(f"kind: {name}: expected losses in the log-probs' {policy.dtype}, got {losses.dtype}")
    return losses


# ---- admission ------------------------------------------------------------------------------------------------------

# Made-up log-probs of rows under policy and reference, nats, and the responses' tokens; 0 where a list ends. Of the
# lists of four, one lies below the reference and one above it: a maximum or minimum sees the 0 of wider padding.
_POLICY = [[-7.0, -9.5, -8.25, -11.0], [-12.0, -6.5, -9.0, 0.0], [-20.5, -23.0, 0.0, 0.0], [-3.0, -8.0, -4.5, -6.0]]
_REF = [[-6.5, -8.0, -7.0, -10.0], [-11.0, -7.5, -9.5, 0.0], [-22.0, -21.5, 0.0, 0.0], [-4.25, -8.5, -5.5, -6.75]]
_TOKENS = [[5, 7, 4, 6], [9, 3, 8, 0], [11, 12, 0, 0], [2, 6, 3, 5]]
_RANKS = [[0, 1, 2, 3], [0, 0, 1, -1], [0, 1, -1, -1], [0, 1, 1, 2]]
_SCORES = [[0.9, 0.6, 0.3, 0.1], [0.75, 0.75, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0], [0.8, 0.5, 0.5, 0.2]]
_MARGIN = [0.25, 0.0, 0.5, -0.125]


def admit(name: str, loss: LossOptions, encoded: str) -> None:
    """Try a function of one's own on a few made-up rows, in float64 and in float32; once for each loss.

    Args:
        name: the function.
        loss: the loss that it is, or is a part of.
        encoded: names that loss.

    Raises:
        ValueError: it raises, returns no tensor, another shape or dtype, NaN or infinity, has no gradient to the
            policy's log-probs, writes into what it is given, or reads what it has not declared.
    """
    if (name, encoded) in _ADMITTED:
        return
    with recording():
        _Trial(name, kind_of(name), loss).run()
        _Trial(name, kind_of(name), loss, torch.float32).run_alone()
    _ADMITTED.add((name, encoded))


class _Trial:
    def __init__(self, name: str, kind: Kind, loss: LossOptions, dtype: torch.dtype = torch.float64) -> None:
        self.name, self.kind, self.loss, self.dtype = name, kind, loss, dtype
        self.policy = torch.tensor(_POLICY, dtype=dtype, device="cpu")
        self.ref = torch.tensor(_REF, dtype=dtype, device="cpu")

    def run_alone(self) -> tuple[Tensor, Tensor]:
        """(leaf, losses) of all rows, finite and with a gradient."""
        policy = self.policy.clone().requires_grad_()
        losses = self.losses(policy, self.ref if self.kind.reference else torch.zeros_like(self.ref))
        self.check_finite(losses)
        self.check_gradient(losses, policy)
        return policy, losses

    def run(self) -> None:
        policy, losses = self.run_alone()
        if not self.kind.reference and not torch.equal(losses, self.losses(policy, self.ref)):
            self.refuse("reads the reference's log-probs: declare it by @preference_kind(reference=True)")
        if not self.kind.coupled:
            self.check_separable(losses)
        if self.kind.lists:
            wider = self.losses(policy, self.ref if self.kind.reference else torch.zeros_like(self.ref), more=2)
            if not _close(wider, losses):
                self.refuse("reads places where a list has ended: leave out those where x.member is False")

    def losses(
        self, policy: Tensor, ref: Tensor, *, rows: Sequence[int] = (0, 1, 2, 3), more: int = 0, lengths: bool = False
    ) -> Tensor:
        """The function's losses of some rows, with `more` places than the longest list."""
        index = torch.tensor(rows, device="cpu")
        try:
            x = self.inputs(policy, ref, index, more, lengths or bool(self.kind.lengths))
            given = {name: value.detach().clone() for name, value in vars(x).items() if isinstance(value, Tensor)}
            losses = self.kind.function(x, self.loss)
        except _NoLoss:
            raise
        except (Exception, SystemExit) as error:
            kind = "Lists" if self.kind.lists else "Pairs"
            raise ValueError(
                f"kind: {self.name}: expected a function of ({kind}, LossOptions), and on {len(rows)} made-up "
                f"row{'s' * (len(rows) > 1)} in {str(self.dtype).removeprefix('torch.')} it raised {_said(error)}"
            ) from error
        for name, value in given.items():
            if not torch.allclose(getattr(x, name).detach(), value, rtol=0, atol=0, equal_nan=True):
                self.refuse(
                    f"writes into {name}, which others read too: compute a new tensor, without +=, mul_() or out="
                )
        return losses

    def inputs(self, policy: Tensor, ref: Tensor, index: Tensor, more: int, lengths: bool) -> Pairs | Lists:
        tokens = torch.tensor(_TOKENS, device="cpu")
        counts = tokens if lengths else None
        ranks = torch.nn.functional.pad(torch.tensor(_RANKS, dtype=torch.int32, device="cpu"), (0, more), value=-1)
        sequences = torch.arange(ranks.numel(), device="cpu").view(ranks.shape)
        scores = torch.tensor(_SCORES, dtype=self.dtype, device="cpu")
        columns = NO_COLUMNS
        if self.kind.margin:
            columns = PreferenceColumns(margin=torch.tensor(_MARGIN, dtype=self.dtype, device="cpu")[index])
        if self.kind.lists:
            wide = partial(torch.nn.functional.pad, pad=(0, more))
            columns = columns._replace(
                lists=torch.where(ranks < 0, -1, sequences).int()[index],
                ranks=ranks[index],
                scores=wide(scores)[index] if self.kind.scores else None,
            )
            flat = None if counts is None else wide(counts).flatten()
            return make_lists(
                wide(policy).flatten(), wide(ref).flatten(), flat, sequences[index, :2], self.loss, columns
            )
        sides = slice(0, 2)
        return StepTotals(len(_TOKENS), int(tokens[:, 0].sum())).make_pairs(
            policy[index, sides],
            ref[index, sides],
            None if counts is None else counts[index, sides],
            self.loss,
            columns,
        )

    def check_finite(self, losses: Tensor) -> None:
        if losses.isfinite().all():
            return
        if not self.kind.lengths and self.losses(self.policy, self.ref, lengths=True).isfinite().all():
            self.refuse(
                "reads token counts, which are NaN unless it is declared that they are needed: "
                "@preference_kind(lengths=True)"
            )
        self.refuse(f"expected finite losses, got {losses.tolist()} on made-up rows")

    def check_gradient(self, losses: Tensor, policy: Tensor) -> None:
        advice = "compute it from the policy's log-probs by torch operations, without detach(), item() or numpy()"
        if not losses.requires_grad:
            self.refuse(f"has no gradient to the policy's log-probs: {advice}")
        try:
            weights = torch.arange(1.0, 1 + len(losses), dtype=losses.dtype, device=losses.device)
            (gradient,) = torch.autograd.grad((losses * weights).sum(), policy, allow_unused=True)
        except Exception as error:
            raise ValueError(f"kind: {self.name}: its gradient raised {_said(error)}") from error
        if gradient is None or not gradient.any():
            self.refuse(f"is constant: its gradient to the policy's log-probs is 0 on all made-up rows: {advice}")
        if not gradient.isfinite().all():
            self.refuse(
                "has a gradient of NaN or infinity on made-up rows, though its losses are finite: a torch.where hides "
                "a branch's value, not its gradient"
            )

    def check_separable(self, losses: Tensor) -> None:
        ref = self.ref if self.kind.reference else torch.zeros_like(self.ref)
        alone = torch.cat([self.losses(self.policy, ref, rows=[row]) for row in range(len(losses))])
        if not _close(alone, losses):
            self.refuse(
                "couples the rows: a row's loss alone differs from its loss among others. Declare it by "
                "@preference_kind(coupled=True), or compute each row's by itself"
            )

    def refuse(self, what: str) -> None:
        raise ValueError(f"kind: {self.name}: {what}")


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.detach(), other.detach(), rtol=1e-9, atol=1e-12)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
