"""A mixed-integer program and its solver (HiGHS): columns, rows, least cost. One thread, one seed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import highspy
import numpy as np

INFINITY = highspy.kHighsInf
_SMALL = 100  # columns
_SCALE = (
    1e4  # the objective is brought to about this size, so that 1e-6 of tolerance is small in it
)


@dataclass(frozen=True, slots=True)
class Limits:
    """When the solver stops: at a relative gap, after nodes of its tree, or, at worst, seconds.

    The first two stop it at the same place every time. Small programs are solved to the end unless
    a `gap` is given, others to half a percent or, should that be hard, a few nodes and then to one
    percent by `placement.neighbours`: less than predictions are worth, within seconds.
    """

    time_s: float = 30.0
    gap: float | None = None
    nodes: int | None = None

    def gap_for(self, columns: int) -> float:
        """The gap at which a program of so many columns is done."""
        if self.gap is not None:
            return self.gap
        return 0.0 if columns <= _SMALL else 0.005

    def nodes_for(self, columns: int) -> int:
        """The most nodes that are looked at for a program of so many columns."""
        if self.nodes is not None:
            return self.nodes
        return 10_000 if columns <= _SMALL else 300


@dataclass(frozen=True, slots=True)
class Answer:
    """The best values found, what they cost, and that none cost less than `bound`."""

    values: tuple[float, ...]
    cost: float
    bound: float
    seconds: float
    prices: tuple[float, ...] = ()  # of a row's bound, one more: without whole columns only


@dataclass(slots=True)
class Program:
    """Minimise cost over columns between bounds, subject to rows between bounds."""

    _costs: list[float] = field(default_factory=list)
    _lower: list[float] = field(default_factory=list)
    _upper: list[float] = field(default_factory=list)
    _integer: list[bool] = field(default_factory=list)
    _rows: list[tuple[Mapping[int, float], float, float]] = field(default_factory=list)
    _following: int = 0

    def column(
        self,
        cost: float = 0.0,
        *,
        upper: float = INFINITY,
        lower: float = 0.0,
        whole: bool = True,
        follows: bool = False,
    ) -> int:
        """Add a column; its index. `follows`: it depends on another, and makes little work."""
        self._following += follows
        self._costs.append(cost)
        self._lower.append(lower)
        self._upper.append(upper)
        self._integer.append(whole)
        return len(self._costs) - 1

    def row(
        self,
        terms: Iterable[tuple[int, float]],
        *,
        lower: float = -INFINITY,
        upper: float = INFINITY,
    ) -> None:
        """Add lower <= sum of factor x column <= upper."""
        self._rows.append((dict(terms), lower, upper))

    def solve(self, limits: Limits, start: Sequence[float] | None = None) -> Answer | None:
        """The least cost, beginning at `start`, a feasible point; None: there is no feasible point.

        When a limit comes first and nothing better is known, `start` is the answer; without a
        `start`, None may then also mean that none was found.
        """
        if not self._costs:
            return _of_nothing(self._rows)
        reference = sum(c * v for c, v in zip(self._costs, start or (), strict=False))
        size = abs(reference) or max((abs(cost) for cost in self._costs), default=0.0)
        scale = _SCALE / size if size > 0 else 1.0
        solver = _solver(limits, self._size)
        solver.passModel(self._problem(scale))
        if start is not None:
            given = highspy.HighsSolution()
            given.col_value = list(start)
            given.value_valid = True
            solver.setSolution(given)
        solver.run()
        info = solver.getInfo()
        found = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
        if not found:
            return None
        values = tuple(
            float(round(value)) if whole else value
            for value, whole in zip(solver.getSolution().col_value, self._integer, strict=True)
        )
        cost = self.cost(values)
        bound = info.mip_dual_bound if any(self._integer) else info.objective_function_value
        return Answer(
            values=values,
            prices=() if any(self._integer) else _prices(solver, scale),
            cost=cost,
            bound=min(cost, bound / scale),
            seconds=solver.getRunTime(),
        )

    def with_fixed(self, values: Mapping[int, float]) -> Program:
        """The same program with these columns at these values."""
        lower, upper = list(self._lower), list(self._upper)
        for index, value in values.items():
            lower[index] = upper[index] = value
        return replace(self, _lower=lower, _upper=upper)

    @property
    def whole(self) -> list[int]:
        """The columns that are whole numbers."""
        return [index for index, whole in enumerate(self._integer) if whole]

    @property
    def width(self) -> int:
        """Number of columns."""
        return len(self._costs)

    @property
    def large(self) -> bool:
        """Whether it is too large to be solved to the end."""
        return self._size > _SMALL

    @property
    def _size(self) -> int:
        return len(self._costs) - self._following

    def cost(self, point: Sequence[float]) -> float:
        """What a point costs."""
        return sum(cost * value for cost, value in zip(self._costs, point, strict=True))

    def _problem(self, scale: float) -> highspy.HighsLp:
        problem = highspy.HighsLp()
        problem.num_col_, problem.num_row_ = len(self._costs), len(self._rows)
        problem.col_cost_ = np.array(self._costs) * scale
        problem.col_lower_, problem.col_upper_ = np.array(self._lower), np.array(self._upper)
        problem.integrality_ = [
            highspy.HighsVarType.kInteger if whole else highspy.HighsVarType.kContinuous
            for whole in self._integer
        ]
        problem.row_lower_ = np.array([lower for _, lower, _ in self._rows])
        problem.row_upper_ = np.array([upper for _, _, upper in self._rows])
        matrix = problem.a_matrix_
        matrix.format_ = highspy.MatrixFormat.kRowwise
        matrix.num_col_, matrix.num_row_ = len(self._costs), len(self._rows)
        terms = [term for row, _, _ in self._rows for term in row.items()]
        matrix.start_ = np.cumsum([0, *(len(row) for row, _, _ in self._rows)], dtype=np.int32)
        matrix.index_ = np.array([index for index, _ in terms], dtype=np.int32)
        matrix.value_ = np.array([value for _, value in terms], dtype=float)
        return problem


class Relaxation:
    """A program whose columns need not be whole, solved anew whenever a bound changes.

    `values`: the best point; None: there is none.
    """

    def __init__(self, program: Program) -> None:
        problem = program._problem(1.0)  # noqa: SLF001 - the same program, of this module
        problem.integrality_ = []
        self._bounds = list(zip(problem.col_lower_, problem.col_upper_, strict=True))
        self._demands: defaultdict[int, list[tuple[int, float]]] = defaultdict(list)
        for row, (terms, lower, _) in enumerate(program._rows):  # noqa: SLF001
            for index, factor in terms.items():
                if factor > 0 and lower > -INFINITY:
                    self._demands[index].append((row, lower))
        self._solver = highspy.Highs()  # type: ignore[no-untyped-call]
        self._solver.silent()
        for option, value in (("threads", 1), ("random_seed", 0), ("presolve", "off")):
            self._solver.setOptionValue(option, value)
        self._solver.passModel(problem)
        self.values: Sequence[float] | None = None
        self._rows: Sequence[float] = ()
        self._solve()

    def narrow(self, column: int, lower: float, upper: float) -> bool:
        """Keep a column between these bounds from now on; False: it cannot be, and stays free.

        What cannot be leaves the `values` as they were.
        """
        before, values, rows = self._bounds[column], self.values, self._rows
        self._bounds[column] = (max(before[0], lower), min(before[1], upper))
        if self._bounds[column][0] <= self._bounds[column][1]:
            self._solver.changeColBounds(column, *self._bounds[column])
            self._solve()
            if self.values is not None:
                return True
        self._bounds[column] = before
        self._solver.changeColBounds(column, *before)
        self.values, self._rows = values, rows
        return False

    def is_scarce(self, column: int) -> bool:
        """Whether a row that it adds to has just as much as it needs."""
        return any(
            self._rows[row] <= lower + 1e-6 * max(1.0, abs(lower))
            for row, lower in self._demands[column]
        )

    def _solve(self) -> None:
        self._solver.run()
        self.values = None
        if self._solver.getModelStatus() == highspy.HighsModelStatus.kOptimal:
            solution = self._solver.getSolution()
            self.values, self._rows = solution.col_value, solution.row_value


def _solver(limits: Limits, columns: int) -> highspy.Highs:
    solver = highspy.Highs()  # type: ignore[no-untyped-call]
    solver.silent()
    for option, value in (
        ("threads", 1),
        ("random_seed", 0),
        ("mip_rel_gap", limits.gap_for(columns)),
        ("mip_abs_gap", 1e-7),
        ("mip_feasibility_tolerance", 1e-7),
        ("primal_feasibility_tolerance", 1e-8),
        ("mip_max_nodes", limits.nodes_for(columns)),
        ("time_limit", limits.time_s),
    ):
        solver.setOptionValue(option, value)
    return solver


def _prices(solver: highspy.Highs, scale: float) -> tuple[float, ...]:
    return tuple(dual / scale for dual in solver.getSolution().row_dual)


def _of_nothing(rows: Iterable[tuple[Mapping[int, float], float, float]]) -> Answer | None:
    if any(lower > 0 or upper < 0 for _, lower, upper in rows):
        return None
    return Answer(values=(), cost=0.0, bound=0.0, seconds=0.0)
